"""Conditions on matches that several rewrites share."""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from surgery import Const
from surgery.rules._rewriting.match import RewriteMatch

__all__ = ["drops_nothing", "dropouts_of", "near"]


def drops_nothing(match: RewriteMatch) -> bool:
    """Whether the operations between those of the pattern are casts and copies: no dropout and no detach."""
    between = [match.site.node_of(value) for value in match.found.passed]
    return not any(_is_named(match, node, "dropout") or _is_named(match, node, "detach") for node in between)


def dropouts_of(match: RewriteMatch) -> list[fx.Node]:
    """Returns the dropouts between the operations of the pattern."""
    between = [match.site.node_of(value) for value in match.found.passed]
    return [node for node in between if _is_named(match, node, "dropout")]


def near(value: float) -> Any:
    """In a pattern: a number of the code that is this number to seven digits."""
    return Const(where=lambda other: math.isclose(other, value, rel_tol=1e-7))


def _is_named(match: RewriteMatch, node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        module = match.site.module.get_submodule(str(node.target))
        return name == "dropout" and isinstance(module, nn.modules.dropout._DropoutNd)
    target = node.args[1] if getattr(node.target, "__name__", "") == "in_region" else node.target
    return name in (target if isinstance(target, str) else getattr(target, "__name__", ""))
