"""`surgery check`: which programs take an adapter, and how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.answer import Answer, Table
from surgery.commands.exit_codes import ERROR
from surgery.commands.options import ClassName, Trust
from surgery.commands.paths import existing

if TYPE_CHECKING:
    from surgery.serving.source import AdapterSource

__all__ = ["Component", "HighestRank", "LostShare", "check", "open_adapter"]

Component = Annotated[
    str | None, typer.Option(help="The component of a pipeline that it is for: unet, text_encoder, …")
]
HighestRank = Annotated[int | None, typer.Option("--rank", help="The highest rank of a conversion to LoRA.")]
LostShare = Annotated[
    float | None, typer.Option("--tolerance", help="The share of each change that a conversion to LoRA may lose.")
]


def check(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder or file of an adapter.", show_default=False)
    ],
    target: Annotated[
        str | None, typer.Option(help="One program: vllm, sglang, llama.cpp, mlx, …; default: all, as a table.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the model that it is for. It is loaded if rules become LoRA.")
    ] = None,
    rank: HighestRank = None,
    tolerance: LostShare = None,
    component: Component = None,
    class_name: ClassName = None,
    trust: Trust = False,
) -> Answer:
    """Show which programs take an adapter, what is done to it for that, and why others do not take it.

    With --target, the exit code is 1 if the program does not take the adapter.

        surgery check adapters/news --target vllm --base models/llama
    """
    from surgery.serving.check import report_of
    from surgery.serving.evaluation import evaluate
    from surgery.serving.known import profile_named, target_profiles

    existing(adapter)
    profiles = [profile_named(target)] if target is not None else list(target_profiles().values())
    source = open_adapter(adapter, base, profiles, rank, tolerance, component, class_name, trust)
    if target is not None:
        report = report_of(evaluate(profiles[0], source), source)
        return Answer({"adapter": str(adapter), **report.to_dict()}, [str(report)], 0 if report else ERROR)
    reports = [report_of(evaluate(profile, source), source, others=False) for profile in profiles]
    rows = [[report.target, report.title, "yes" if report else "no", report.summary()] for report in reports]
    data = {"adapter": str(adapter), "targets": [report.to_dict() for report in reports]}
    return Answer(data, [Table(["target", "program", "takes it", ""], rows)])


def open_adapter(
    adapter: Path,
    base: Path | None,
    profiles: Any,
    rank: int | None,
    tolerance: float | None,
    component: str | None,
    class_name: str | None,
    trust: bool,
) -> AdapterSource:
    """The adapter from its files; on the model, if rules become LoRA for one of the programs."""
    from surgery.serving.facts import needs_conversion
    from surgery.serving.source import FilesSource, ModelSource

    files = FilesSource(adapter, base, component)
    plain = files.plain
    if base is None or plain is not None and not any(needs_conversion(each, plain, rank) for each in profiles):
        return files
    from surgery.commands.adapters import base_class, load_all, names_of
    from surgery.commands.model_folder import load_model

    model = load_model(existing(base), class_name or base_class([adapter]))
    load_all(model, [adapter], trust=trust, same_base=True)
    return ModelSource(model, names_of([adapter])[0], rank, tolerance, component=component)
