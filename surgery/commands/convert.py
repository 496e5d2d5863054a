"""`surgery convert`: an adapter's files in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.answer import Answer
from surgery.commands.check import Component, HighestRank, LostShare, open_adapter
from surgery.commands.new_files import check_new_file, check_new_folder, new_files, new_folder
from surgery.commands.options import ClassName, Trust
from surgery.commands.paths import existing
from surgery.errors import SurgeryError

__all__ = ["convert"]

FILE_ENDINGS = (".safetensors", ".gguf", ".onnx_adapter")


def convert(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder or file of an adapter.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder or file to write.")],
    to: Annotated[
        str | None, typer.Option("--to", help="The format to write: peft, diffusers, kohya, mlx, gguf, …")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="In place of --to: the program that is to open it: vllm, sglang, llama.cpp, …")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="The adapter's format, if its keys are those of several.")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="The folder of the model that it is for.")] = None,
    component: Component = None,
    rank: HighestRank = None,
    tolerance: LostShare = None,
    class_name: ClassName = None,
    trust: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> Answer:
    """Rewrite an adapter in the format of another program, or for a program that is to open it.

    With --to, from its tensors alone. With --target, it is changed to what the program takes; `surgery check` tells
    how. What can't be written is an error, and nothing is written.

        surgery convert my_lora.safetensors --to diffusers --out adapters/mine
        surgery convert adapters/mine --target vllm --base models/llama --out served/mine
    """
    from surgery.storage.formats.conversion import convert_adapter

    existing(adapter)
    if (to is None) == (target is None):
        raise SurgeryError("the result is not named", fix="--to names its format, or --target the program")
    as_file = out.suffix in FILE_ENDINGS
    check_new_file(out, overwrite) if as_file else check_new_folder(out)
    with new_files(out, overwrite) if as_file else new_folder(out) as place:
        written = place / out.name if as_file else place
        if target is not None:
            opened = (adapter, base, rank, tolerance, component, class_name, trust)
            return _for_program(target, place / out.name if as_file else place, out, opened)
        assert to is not None
        options = {"source_format": source_format, "base": base, "component": component}
        report = convert_adapter(adapter, written, format=to, **options)  # type: ignore[arg-type]
        report.path = out
    return Answer(report.to_dict(), [str(report)])


def _for_program(target: str, written: Path, out: Path, opened: tuple[Any, ...]) -> Answer:
    """Writes the adapter in the form that a program takes."""
    from surgery.serving.check import report_of
    from surgery.serving.evaluation import evaluate
    from surgery.serving.known import profile_named
    from surgery.serving.write import write_target

    profile = profile_named(target)
    adapter, base, *others = opened
    source = open_adapter(adapter, base, [profile], *others)
    result = evaluate(profile, source)
    write_target(result, source, written, {}, True)
    report = report_of(result, source)
    return Answer({"path": str(out), **report.to_dict()}, [f"{out}: {report}"])
