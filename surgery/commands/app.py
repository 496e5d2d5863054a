"""The typer application: its commands in the order of the help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from surgery import __version__
from surgery.commands.answer import Answer, answers
from surgery.commands.apply import apply
from surgery.commands.bench import bench
from surgery.commands.check import check
from surgery.commands.command_group import CommandGroup
from surgery.commands.convert import convert
from surgery.commands.diff import diff
from surgery.commands.doctor import doctor
from surgery.commands.export import export
from surgery.commands.extract import extract
from surgery.commands.inspect import inspect
from surgery.commands.merge import merge
from surgery.commands.plan import plan
from surgery.commands.rules import rules
from surgery.commands.unmerge import unmerge

__all__ = ["app"]

COMMANDS: tuple[Callable[..., Answer], ...] = (
    inspect, plan, apply, merge, unmerge, check, convert, extract, export, diff, rules, doctor, bench,
)  # fmt: skip

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
for command in COMMANDS:
    app.command(no_args_is_help=command not in (rules, doctor))(answers(command))


def _print_version(value: bool) -> None:
    if value:
        print(f"surgery {__version__}")
        raise typer.Exit


@app.callback()
def surgery(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapters and models in files: look at them, plan rules, apply, merge, convert, export, compare.

    Exit codes: 0 done, 1 an error, 2 wrong arguments, 130 interrupted. Every command takes --json.
    """
