"""Texts of the engine in the words of a command: options for the arguments of Python functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from surgery.errors import PlanError, SurgeryError

__all__ = ["parameters_of", "use_options", "with_options"]

_FILE = "--example FILE.safetensors"
_CALL = f"--with-example, or {_FILE}"
_PASS_EXAMPLE = r"(?:pass|give) example_inputs(?:: apply_rules and load_adapter take them)?"
_WRITER, _LOADER = r"save_adapter\(…, ", r"(?:\w*load_adapter|hotswap|merge_files)\(…, "
_MERGER = r"merge(?:_to|_files)?\([^()]*, "

# An argument in a text, the parameter of commands that stands for it, and the words for a person at a terminal. The
# first row whose parameter the command has is taken.
_WORDS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(argument), parameter, words)
    for argument, parameter, words in (
        (r"pass example_inputs as a tensor, a tuple of arguments, or a dict of keyword arguments",
         "example", f"{_FILE}, with the tensors of one call by name"),
        (r"leave them out of example_inputs", "example", f"leave them out of the file of {_FILE}"),
        (_PASS_EXAMPLE, "with_example", _CALL),
        (_PASS_EXAMPLE, "example", _FILE),
        (r"example_inputs", "example", "an example call"),
        (_LOADER + r"same_base=False\)", "any_base", "--any-base"),
        (_LOADER + r"trust=True\)", "trust", "--trust"),
        (_WRITER + r'format="surgery"\)', "format", "--format surgery"),
        (_MERGER + r"untie=True\)(?: and keep this model)?", "untie", "--untie"),
        (_MERGER + r'quantised="(\w+)"(?:, dtype=…)?\)', "quantised", r"--quantised \1"),
        (r"\blimit=None", "quantised", "--limit inf"),
        (r"\blimit=", "quantised", "--limit "),
        (r"\brounding=", "quantised", "--rounding "),
        (r"keep_record=True", "keep_record", "--keep-record"),
        (r"leave out dtype=", "dtype", "leave out --dtype"),
        (r"workers=", "workers", "--workers "),
        (r"make one of them live at a time", "weight", "merge one of them at a time"),
        (r"make one of them live at a time", "form", "export one of them at a time, or use --as slots"),
        (r"keep (?:it|the adapter) unmerged", "form", "--as constant, or --as slots"),
        (r'adapters="constant" or "merged"', "form", "--as constant or --as merged"),
        (r'adapters="(constant|merged|slots)"', "form", r"--as \1"),
        (r"(?:use )?cache=True", "cache", "--cache"),
        (r"(?:use )?cache=False", "cache", "leave --cache out"),
        (r"use one of these, or None", "opset", "use one of these, or leave --opset out"),
        (r"opset=(\d+)", "opset", r"--opset \1"),
        (r"verify=False", "verify", "--no-verify"),
        (r"\bbase=", "base", "--base"),
        (r"\bcomponent=(?= )", "component", "--component"),
        (r"\bcomponent=", "component", "--component "),
        (r"\bformat=(?= )", "source_format", "--from"),
        (r"\bformat=", "source_format", "--from "),
    )
)  # fmt: skip
# What only a program can write: a call of a function, or an argument that no command has.
_PYTHON = re.compile(r"\b[a-z_.]+\([^)]|\b(?:atol|component|dynamic|empty|finite|optimize|strict)=")


def parameters_of(command: Callable[..., object]) -> frozenset[str]:
    """The names of a command's parameters."""
    code = command.__code__  # type: ignore[attr-defined]
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def with_options(text: str, parameters: Collection[str]) -> str:
    """The text with options for the arguments that the command has options for.

    >>> with_options("PrefixRule needs example_inputs", ("example",))
    'PrefixRule needs an example call'
    """
    for argument, parameter, words in _WORDS:
        if parameter in parameters:
            text = argument.sub(words, text)
    return text


def use_options(error: Exception, parameters: Collection[str]) -> None:
    """Puts options into the texts of an error and of its problems. What only a program can do is marked."""
    for problem in error.problems if isinstance(error, PlanError) else ():
        use_options(problem, parameters)
    if isinstance(error, SurgeryError):
        error.what = with_options(error.what, parameters)
        error.why = error.why and with_options(error.why, parameters)
        error.fix = error.fix and _marked(with_options(error.fix, parameters))


def _marked(fix: str) -> str:
    """A fix with its clauses for programs last, after "in Python".

    >>> _marked("merge(model, keep='copy'); or name another folder")
    "name another folder; in Python: merge(model, keep='copy')"
    """
    clauses = [clause.removeprefix("or ") for clause in fix.split("; ")]
    programs = [clause for clause in clauses if _PYTHON.search(clause)]
    others = [clause for clause in clauses if clause not in programs]
    if not programs:
        return fix
    return "; ".join([*others, f"in Python: {'; '.join(programs)}"])
