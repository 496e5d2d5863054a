"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AdapterPaths",
    "ClassName",
    "DryRun",
    "Example",
    "ModelPath",
    "PlanningExample",
    "RulesPath",
    "Trust",
    "Untie",
    "WithExample",
    "Workers",
]

ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder with a model of transformers.", show_default=False)
]
RulesPath = Annotated[
    Path,
    typer.Argument(
        metavar="RULES", help='A file of rules, YAML or JSON; "-" is the standard input.', show_default=False
    ),
]
AdapterPaths = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER", help="Adapters: folders or safetensors files.", show_default=False)
]
ClassName = Annotated[
    str | None,
    typer.Option("--class", help="The model's class in transformers; default: the one that the files name."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Plan and check only; write nothing. Only an example call reads weights."),
]
Example = Annotated[
    Path | None,
    typer.Option(help="A safetensors file with the tensors of one call by name; default: made for the model."),
]
PlanningExample = Annotated[
    Path | None,
    typer.Option(help="Call the model with the tensors of a safetensors file, by name, which some rules need."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Accept rules that name code to import.")]
WithExample = Annotated[
    bool, typer.Option("--with-example", help="Call the model with an example that is made for it.")
]
Workers = Annotated[int, typer.Option(min=1, help="Threads; each needs the memory of one tensor.")]
Untie = Annotated[bool, typer.Option("--untie", help="Let tied weights become different.")]
