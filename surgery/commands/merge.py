"""`surgery merge`: a model and adapters become a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.adapters import base_class, load_all, names_of
from surgery.commands.answer import Answer, size_text
from surgery.commands.example_call import model_and_call
from surgery.commands.new_files import check_new_folder, new_folder
from surgery.commands.options import (
    AdapterPaths,
    ClassName,
    DryRun,
    ModelPath,
    PlanningExample,
    Trust,
    Untie,
    WithExample,
)
from surgery.commands.paths import size_of
from surgery.errors import SurgeryError

__all__ = ["AnyBase", "Weights", "merge"]

Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="A weight for each adapter, in their order; default 1.")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Another base than the adapter's is only a warning.")]


def merge(
    model: ModelPath,
    adapters: AdapterPaths,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; new or empty.")],
    weight: Weights = None,
    untie: Untie = False,
    any_base: AnyBase = False,
    example: PlanningExample = None,
    with_example: WithExample = False,
    class_name: ClassName = None,
    trust: Trust = False,
    dry_run: DryRun = False,
) -> Answer:
    """Merge adapters into a model and write a plain checkpoint, which loads without this package.

    surgery merge models/bert adapters/topics --out merged
    """
    from surgery import activate, merge_to

    check_new_folder(out)
    names = names_of(adapters)
    if weight and len(weight) != len(names):
        raise SurgeryError(f"there are {len(weight)} weights for {len(names)} adapters", fix="--weight once for each")
    kind = class_name or base_class(adapters)
    net, call = model_and_call(model, kind, example, with_example, weights=not dry_run)
    reports = load_all(net, adapters, trust=trust, same_base=not any_base, example=call)
    data = {"out": str(out), "written": not dry_run, "model": type(net).__name__, "adapters": reports}
    lines = [f"{name}: {len(report['loaded'])} tensors fit" for name, report in zip(names, reports, strict=True)]
    if dry_run:
        return Answer(data, [*lines, f"{out} would be {type(net).__name__} with {', '.join(names)} merged"])
    if weight:
        activate(net, names, weights=weight)
    with new_folder(out) as place:
        merge_to(net, place, untie=untie, progress=True)
        files = sorted(file.name for file in place.iterdir())
    size = size_of(out)
    text = f"{out}: {type(net).__name__} with {', '.join(names)} merged, {size_text(size)}"
    return Answer({**data, "files": files, "nbytes": size}, [*lines, text])
