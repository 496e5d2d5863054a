"""Finds the line of the user's code that caused an error or is running, skipping the engine's and torch's code."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import sys
import textwrap
import traceback
from typing import Any

import torch

__all__ = ["is_ours", "is_torchs", "line_of", "line_running", "line_setting"]

ENGINE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the package of the engine
_RULES = os.path.join(ENGINE_FOLDER, "rules", "")  # lines of the rule library count as user code
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


def is_ours(filename: str) -> bool:
    """Whether a source file belongs to the engine, or is generated code."""
    return filename.startswith((ENGINE_FOLDER, "<surgery ")) and not filename.startswith(_RULES)


def is_torchs(filename: str) -> bool:
    """Whether a source file belongs to torch."""
    return filename.startswith(_TORCH)


def line_of(error: BaseException, function: Any = None) -> str | None:
    """Returns `file:number: text` of the innermost user line of an error; without one, the function's first line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_ours(frame.filename)]
    users = [frame for frame in frames if not is_torchs(frame.filename)] or frames
    if users:
        text = users[-1].line or linecache.getline(users[-1].filename, users[-1].lineno or 0).strip()
        return f"{users[-1].filename}:{users[-1].lineno}: {text}"
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def line_running(with_text: bool = False) -> str:
    """Returns `file:number` of the innermost running line outside the engine and torch, optionally with its text."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    users = frame
    while (
        with_text
        and users.f_back is not None
        and (is_torchs(users.f_code.co_filename) or is_ours(users.f_code.co_filename))
    ):
        users = users.f_back
    text = f": {linecache.getline(users.f_code.co_filename, users.f_lineno).strip()}" if with_text else ""
    return f"{users.f_code.co_filename}:{users.f_lineno}{text}"


def line_setting(function: Any, attribute: str) -> str | None:
    """Returns `file:number: text` of the line where a function assigns this attribute, else its first line."""
    plain = inspect.unwrap(function)
    try:
        lines, start = inspect.getsourcelines(plain)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    at = next((node.lineno for node in nodes if node.attr == attribute), 1)
    return f"{inspect.getsourcefile(plain)}:{start + at - 1}: {lines[at - 1].strip()}"
