"""Conditions on matches that several rewrites share."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from surgery import Const
from surgery.rules._rewriting.match import RewriteMatch

__all__ = ["drops_nothing", "dropout_rate", "call_of", "is_broadcast", "name_of_call", "near"]


def drops_nothing(match: RewriteMatch) -> bool:
    """Whether the operations between those of the pattern are casts and copies: no dropout and no detach."""
    between = [match.site.node_of(value) for value in match.found.passed]
    return not any(_is_named(match, node, "dropout") or _is_named(match, node, "detach") for node in between)


def dropout_rate(match: RewriteMatch, after: str) -> Any:
    """Returns the rate of the one dropout after an operation of the pattern, for the site's mode; 0 without a dropout.

    Returns None if the match cannot be replaced: there are several, one is at another place, or its rate is a tensor.
    """
    between = [match.site.node_of(value) for value in match.found.passed]
    dropouts = [node for node in between if _is_named(match, node, "dropout")]
    if len(dropouts) > 1 or any(_is_named(match, node, "detach") for node in between):
        return None
    if not dropouts:
        return 0.0
    source = dropouts[0].all_input_nodes[0]
    while source in between or name_of_call(source) in ("view", "reshape") and source in match.nodes:
        source = source.all_input_nodes[0]
    return _rate(match, dropouts[0]) if _is_named(match, source, after) else None


def _rate(match: RewriteMatch, node: fx.Node) -> Any:
    if node.op == "call_module":
        module: Any = match.site.module.get_submodule(str(node.target))
        return module.p if match.site.training else 0.0
    args, kwargs = call_of(node)
    names = ("p", "train" if "train" in kwargs else "training")
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    rate, training = given.get(names[0], 0.5), given.get(names[1], True)
    if training is False:
        return 0.0
    if isinstance(rate, fx.Node) and rate.op == "get_attr" and "shape" not in rate.meta:
        rate = match.site.at(rate)  # a number of the module, such as `self.dropout_p`
    return None if isinstance(rate, fx.Node) or isinstance(training, fx.Node) else rate


def is_broadcast(shape: tuple[int, ...] | None, full: tuple[int, ...]) -> bool:
    """Whether a shape can be expanded to another, which it does not enlarge."""
    if shape is None or len(shape) > len(full):
        return False
    ends = zip(reversed(shape), reversed(full), strict=False)
    return all(size in (1, expanded) for size, expanded in ends)


def near(value: float) -> Any:
    """In a pattern: a number of the code that is this number to seven digits."""
    return Const(where=lambda other: math.isclose(other, value, rel_tol=1e-7))


def name_of_call(node: fx.Node) -> str:
    """Returns the name of the function or method that a node calls; empty for a module."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target: Any = node.args[1] if _in_region(node) else node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def call_of(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call, without those of the forward's own autocast or no_grad around it."""
    return (node.args[2:] if _in_region(node) else node.args), dict(node.kwargs)


def _is_named(match: RewriteMatch, node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        module = match.site.module.get_submodule(str(node.target))
        return name in type(module).__name__.lower()
    return name in name_of_call(node)


def _in_region(node: fx.Node) -> bool:
    """Whether a node is a call under the forward's own autocast or no_grad."""
    return getattr(node.target, "__name__", "") == "in_region"
