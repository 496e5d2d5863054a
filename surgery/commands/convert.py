"""`surgery convert`: an adapter's files in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.answer import Answer
from surgery.commands.new_files import check_new_file, check_new_folder, new_files, new_folder
from surgery.commands.paths import existing

__all__ = ["convert"]

FILE_ENDINGS = (".safetensors", ".gguf", ".onnx_adapter")


def convert(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder or file of an adapter.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="The format to write: peft, diffusers, kohya, mlx, gguf, …")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder or file to write.")],
    source_format: Annotated[
        str | None, typer.Option("--from", help="The adapter's format, if its keys are those of several.")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="The folder of the model that it is for.")] = None,
    component: Annotated[
        str | None, typer.Option(help="The component of a pipeline that it is for: unet, text_encoder, …")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> Answer:
    """Rewrite an adapter in the format of another program, from its tensors alone.

    What the other format can't hold is an error, and nothing is written.

        surgery convert my_lora.safetensors --to diffusers --out adapters/mine
    """
    from surgery.storage.formats.conversion import convert_adapter

    existing(adapter)
    as_file = out.suffix in FILE_ENDINGS
    check_new_file(out, overwrite) if as_file else check_new_folder(out)
    with new_files(out, overwrite) if as_file else new_folder(out) as place:
        target = place / out.name if as_file else place
        options = {"source_format": source_format, "base": base, "component": component}
        report = convert_adapter(adapter, target, format=to, **options)  # type: ignore[arg-type]
        report.path = out
    return Answer(report.to_dict(), [str(report)])
