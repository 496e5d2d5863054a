"""How a user's forward takes its inputs and calls its base class's forward, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def takes_one_input(cls: type[nn.Module]) -> bool:
    """Whether a call has exactly one input. Further inputs may change the map."""
    for base in cls.__mro__:
        if base in PLAIN:
            return True
        if "forward" not in vars(base):
            continue
        try:
            parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        except (TypeError, ValueError):
            return False
        stars = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        named_parameters = [p for p in parameters if p.name not in stars]
        if len(named_parameters) > 1 or any(p.kind is p.KEYWORD_ONLY for p in named_parameters):
            return False
        handed = _stars_passed_on(vars(base)["forward"], stars) if stars else ""
        if handed is None or (named_parameters and handed and "*" in handed):
            return False
        if not handed:
            return bool(named_parameters) or "*" in {"*" for p in parameters if p.kind is p.VAR_POSITIONAL}
    return False


def _stars_passed_on(forward: Any, stars: set[str]) -> str | None:
    """Returns which starred inputs a forward passes on to its base class: "", "*", "**" or "***".

    None if it uses them in another way than this, or than by reading the first one.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    allowed: set[int] = set()
    stars_passed = ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_supers(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Starred):
                    allowed.add(id(argument.value))
                    stars_passed += "*"
            for word in node.keywords:
                if word.arg is None:
                    allowed.add(id(word.value))
                    stars_passed += "**"
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            allowed.add(id(node.value))
    star_uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in stars]
    return stars_passed if all(id(node) in allowed for node in star_uses) else None


def adds_to_supers(forward: Any) -> bool:
    """Whether a forward calls its base class's forward and does more than this call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_supers(node.func)]
    if not calls:
        return False
    body = getattr(tree.body[0], "body", [])
    last = body[-1] if body else None
    arguments = [*calls[0].args, *(word.value for word in calls[0].keywords)]
    plain = all(
        isinstance(argument.value if isinstance(argument, ast.Starred) else argument, ast.Name)
        for argument in arguments
    )
    texts = [node for node in body[:-1] if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return bool(texts) or not (isinstance(last, ast.Return) and last.value is calls[0] and plain)


def _is_supers(function: ast.expr) -> bool:
    """`super().forward`, or `super(…).forward`."""
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "forward"
        and isinstance(function.value, ast.Call)
        and isinstance(function.value.func, ast.Name)
        and function.value.func.id == "super"
    )
