"""Which line of a user's code led to an error or is running: not one of the engine's, nor of torch's."""

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

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the package of the engine
_RULES = os.path.join(HERE, "rules", "")  # a rule's lines are told as those of a user's own rule are
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


def is_ours(filename: str) -> bool:
    """Whether a file of source is the engine's, or code that it generated."""
    return filename.startswith((HERE, "<surgery ")) and not filename.startswith(_RULES)


def is_torchs(filename: str) -> bool:
    """Whether a file of source is torch's."""
    return filename.startswith(_TORCH)


def line_of(error: BaseException, function: Any = None) -> str | None:
    """`file:number: text` of the innermost line of a user's that led to an error; else where the function begins."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_ours(frame.filename)]
    users = [frame for frame in frames if not is_torchs(frame.filename)] or frames
    if users:
        text = users[-1].line or linecache.getline(users[-1].filename, users[-1].lineno or 0).strip()
        return f"{users[-1].filename}:{users[-1].lineno}: {text}"
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def line_running(with_text: bool = False) -> str:
    """`file:number` of the innermost line that runs and is not the engine's, nor torch's; its text on request."""
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
    """`file:number: text` where a function assigns to this attribute of something, else where it begins."""
    plain = inspect.unwrap(function)
    try:
        lines, start = inspect.getsourcelines(plain)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    at = next((node.lineno for node in nodes if node.attr == attribute), 1)
    return f"{inspect.getsourcefile(plain)}:{start + at - 1}: {lines[at - 1].strip()}"
