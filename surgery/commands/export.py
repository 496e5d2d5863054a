"""`surgery export`: a model, with or without adapters, as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.commands.adapters import base_class, load_all, names_of
from surgery.commands.answer import Answer
from surgery.commands.example_call import model_and_call
from surgery.commands.merge import AnyBase
from surgery.commands.new_files import check_new_file, new_files
from surgery.commands.options import ClassName, DryRun, Example, ModelPath, Trust
from surgery.errors import SurgeryError

__all__ = ["export"]

ENDING = ".onnx_adapter"


def export(
    model: ModelPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .onnx file to write.")],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ADAPTER", help="Adapters: folders or safetensors files.", show_default=False),
    ] = None,
    form: Annotated[
        Literal["merged", "constant", "slots"],
        typer.Option("--as", help="Adapters folded in, as constants, or as slots with a file for each adapter."),
    ] = "merged",
    cache: Annotated[bool, typer.Option("--cache", help="A decoder's file takes and returns a cache.")] = False,
    opset: Annotated[int | None, typer.Option(help="The ONNX opset; default: the exporter's.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the file with the model.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    any_base: AnyBase = False,
    example: Example = None,
    class_name: ClassName = None,
    trust: Trust = False,
    dry_run: DryRun = False,
) -> Answer:
    """Export a model as ONNX, compared with the model before the file is written.

    With --as slots the file takes any of the adapters at run time. Each adapter is a small file beside it.

        surgery export models/bert adapters/topics --out bert.onnx --as slots
    """
    paths = adapters or []
    check_new_file(out, overwrite)
    names = names_of(paths)
    for name in names if form == "slots" else ():
        check_new_file(out.parent / (name + ENDING), overwrite)
    if form == "slots" and not paths:
        raise SurgeryError("slots are made for adapters", why="none is named", fix="export MODEL ADAPTER… --as slots")
    kind = class_name or base_class(paths)
    net, call = model_and_call(model, kind, example, not dry_run, weights=not dry_run)
    reports = load_all(net, paths, trust=trust, same_base=not any_base, example=call, together=form != "slots")
    data: dict[str, Any] = {"out": str(out), "written": not dry_run, "as": form, "adapters": reports}
    if dry_run:
        fitting = [f"{name}: {len(report['loaded'])} tensors fit" for name, report in zip(names, reports, strict=True)]
        return Answer(data, [*fitting, f"{out} would be {type(net).__name__}, adapters as {form}"])
    from surgery.onnx import export_adapter, export_onnx

    with new_files(out, overwrite) as place:
        options: dict[str, Any] = {"adapters": form, "cache": cache, "opset": opset, "verify": verify}
        report = export_onnx(net, place / out.name, call, progress=True, **options)
        for name in names if form == "slots" else ():
            export_adapter(net, name, report.path, place / (name + ENDING))
        files = sorted(file.name for file in place.iterdir())
    report.path = out
    return Answer({**data, **report.to_dict(), "files": files}, [str(report), f"files: {', '.join(files)}"])
