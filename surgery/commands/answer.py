"""What a command answers, and how it is printed: as text or as JSON, with warnings, errors and exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import re
import sys
import traceback as tracebacks
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from surgery.commands.exit_codes import ERROR, INTERRUPTED, TROUBLE
from surgery.commands.option_words import parameters_of, use_options, with_options
from surgery.errors import PlanError, SurgeryError, SurgeryWarning
from surgery.results import plain, table

__all__ = ["Answer", "Table", "answers", "error_data", "print_json", "size_text"]


@dataclass(frozen=True)
class Table:
    """Rows under a head. On a terminal, long cells are wrapped to its width."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Answer:
    """Data for `--json`, and texts and tables for people. `code`: the exit code."""

    data: Any
    parts: list[str | Table] = field(default_factory=list)
    code: int = 0


JSON = typer.Option("--json", help="Print one JSON document, also for an error.")
TRACEBACK = typer.Option("--traceback", help="Print the traceback of an error.")


def answers(function: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a function that returns an `Answer` a command: adds `--json` and `--traceback`, prints, and exits."""

    def run(*, json: bool, traceback: bool, **arguments: Any) -> None:
        noted: list[str] = []
        names = parameters_of(function)
        error_code = TROUBLE if arguments.get("exit_code") else ERROR
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", SurgeryWarning)
                show = warnings.showwarning

                def note(message: Any, category: type[Warning], *where: Any, **other: Any) -> None:
                    if issubclass(category, SurgeryWarning):
                        noted.append(with_options(str(message), names))
                    else:
                        show(message, category, *where, **other)

                warnings.showwarning = note
                answer = function(**arguments)
        except KeyboardInterrupt:
            _print_note("interrupted: no file is half written")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if traceback:
                tracebacks.print_exc()
            use_options(error, names)
            _print_error(error, json, traceback)
            raise typer.Exit(error_code) from None
        try:
            _print_answer(answer, json, noted)
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has gone, as in `| head`; typer ends without a text
                raise
            _print_note(f"error: the output can't be written: {error}")
            _drop_output()
            raise typer.Exit(error_code) from None
        raise typer.Exit(answer.code)

    functools.update_wrapper(run, function)
    del run.__wrapped__  # type: ignore[attr-defined]  # the signature is another one
    signature = inspect.signature(function, eval_str=True)
    flags = {"json": Annotated[bool, JSON], "traceback": Annotated[bool, TRACEBACK]}
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in flags.items()
    ]
    parameters = [*signature.parameters.values(), *further]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def size_text(nbytes: float) -> str:
    """A number of bytes as people read it.

    >>> size_text(999), size_text(24_900_000)
    ('999 bytes', '24.9 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{int(nbytes)} bytes"


def _print_answer(answer: Answer, as_json: bool, noted: Iterable[str]) -> None:
    noted = list(dict.fromkeys(noted))
    if as_json:
        data = plain(answer.data)
        print_json({**data, "warnings": [*data.get("warnings", ()), *noted]})
        return
    for text in noted:
        _print_note(f"warning: {text}")
    for part in map(_visible_part, answer.parts):
        if sys.stdout is not None and sys.stdout.isatty():
            _print_on_terminal(part)
        else:
            print(table(part.head, part.rows) if isinstance(part, Table) else part)


def _print_on_terminal(part: str | Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, emoji=False)
    if isinstance(part, str):
        console.print(part, soft_wrap=True)
        return
    rich_table = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in part.head:
        rich_table.add_column(name, overflow="fold")
    for row in part.rows:
        rich_table.add_row(*row)
    console.print(rich_table)


def _print_error(error: Exception, as_json: bool, traceback: bool) -> None:
    ours = isinstance(error, SurgeryError)
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        text += f"\n  fix:   pip install 'model-surgery[{extra}]'"
    elif not ours and not isinstance(error, OSError) and not traceback:
        text += "\n  fix:   --traceback shows where it comes from"
    if as_json:
        print_json({"error": error_data(error, text)})
        return
    if sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        console.print(f"error: {_visible(text)}", style="red", soft_wrap=True)
    else:
        _print_note(f"error: {text}")


# The extra of each package that a command may lack.
_EXTRAS = {
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "onnx"),
    **dict.fromkeys(("bitsandbytes", "torchao"), "quant"),
}


def print_json(data: Any) -> None:
    """Prints a document, with escapes for letters that the output's encoding does not have."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    print(text)


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _visible(text: str) -> str:
    """A text with escapes for control characters, since names in files may hold commands for terminals."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _visible_part(part: str | Table) -> str | Table:
    if isinstance(part, str):
        return _visible(part)
    return Table(part.head, [[_visible(cell) for cell in row] for row in part.rows])


def _print_note(text: str) -> None:
    if sys.stderr is not None:  # it is closed, and `print` would write to stdout
        print(_visible(text), file=sys.stderr)


def _drop_output() -> None:
    """Points stdout at nothing, so that Python does not write the rest at its end."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def error_data(error: Exception, text: str) -> dict[str, Any]:
    """An error as plain data, as `--json` prints it."""
    data: dict[str, Any] = {"type": type(error).__name__, "text": text}
    if isinstance(error, PlanError):
        data["problems"] = [error_data(problem, str(problem)) for problem in error.problems]
    elif isinstance(error, SurgeryError):
        data |= {name: getattr(error, name) for name in ("what", "where", "why", "fix")}
    return data
