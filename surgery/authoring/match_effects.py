"""Finds effects of a match's operations that a replacement would lose, and writes that come between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from surgery.forward.side_effects import writes
from surgery.structures.op_aliases import arguments_in, canonicalise

__all__ = ["ReplacedMatch", "active_passages", "dropout_probability", "region_objection", "write_objection"]


class ReplacedMatch(NamedTuple):
    """A match that a rule replaces: the names of its nodes, and of those that are also used outside."""

    nodes: tuple[str, ...]
    shared: tuple[str, ...]


def write_objection(nodes: Collection[fx.Node], shared: Collection[fx.Node]) -> str | None:
    """Returns why writes in place forbid the replacement of a match, or None.

    A write inside the match is harmless if nothing outside sees the memory. A write between the operations of the match
    is harmless if the match does not read the memory: the replacement computes all of it at the match's end.
    """
    inside, ordered = set(nodes), list(nodes)
    for node in ordered:
        if _writes(node):
            base = _memory(_first(node))
            if base not in inside or any(_memory(other) is base for other in shared):
                return f"{node} writes in place to {base}, which is used outside of the match"
    memories = {_memory(source) for node in ordered for source in (node, *node.all_input_nodes)}
    node = ordered[0]
    while node is not ordered[-1]:
        node = node.next
        if node not in inside and _writes(node) and _memory(_first(node)) in memories:
            return f"{node} writes in place to {_memory(_first(node))} between the operations of the match"
    return None


def region_objection(nodes: Collection[fx.Node]) -> str | None:
    """Returns why a match can't be replaced if the forward runs it under an autocast of its own, or None."""
    for node in nodes:
        region = node.args[0] if "called" in node.meta else None
        if isinstance(region, tuple) and region[-1] is not False:  # else it is under torch.no_grad alone
            return f"the forward runs {node} under torch.autocast of its own, and the replacement would not"
    return None


def active_passages(nodes: Collection[fx.Node], module: nn.Module, training: bool) -> Iterator[tuple[str, fx.Node]]:
    """Yields the dropouts that are active in this mode, and each `detach`, among the nodes between those of a match."""
    for node in nodes:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind = canonicalise(node.op, node.target, arguments_in(node), node.kwargs, child).operation
        if kind == "detach" or kind == "dropout" and _drops(node, child, training):
            yield kind, node


def dropout_probability(node: fx.Node, module: nn.Module) -> Any:
    """Returns the probability of a node that is a dropout."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "p", 0.5)
    args = _arguments(node)
    return args[1] if len(args) > 1 else node.kwargs.get("p", 0.5)


def _drops(node: fx.Node, child: nn.Module | None, training: bool) -> bool:
    if child is not None:
        return bool(getattr(child, "p", 0.5)) and bool(training or child.training)
    args = _arguments(node)
    chance = args[1] if len(args) > 1 else node.kwargs.get("p", 0.5)
    return bool(chance != 0 and (args[2] if len(args) > 2 else node.kwargs.get("training", True)) is not False)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args[2:] if "called" in node.meta else node.args


def _writes(node: fx.Node) -> bool:
    called: str | Callable[..., Any] = node.meta.get("called", node.target)
    op = "call_method" if node.op == "call_function" and isinstance(called, str) else node.op
    return writes(op, called, _arguments(node), node.kwargs)


def _first(node: fx.Node) -> Any:
    out = node.kwargs.get("out")
    return (
        out if isinstance(out, fx.Node) else next((arg for arg in _arguments(node) if isinstance(arg, fx.Node)), node)
    )


def _memory(node: Any) -> Any:
    """Returns the node that made the memory of a node's result: behind views and writes in place."""
    while isinstance(node, fx.Node):
        called: Any = node.meta.get("called", node.target)
        name = called if isinstance(called, str) else getattr(called, "__name__", "")
        source = _first(node) if name in _VIEWS or _writes(node) else node
        if source is node:
            break
        node = source
    return node


_VIEWS = frozenset(
    """view view_as reshape reshape_as transpose swapaxes swapdims permute movedim moveaxis t adjoint squeeze unsqueeze
    expand expand_as flatten unflatten ravel narrow select diagonal detach alias chunk split tensor_split unbind unfold
    contiguous to type type_as float double half bfloat16 getitem getattr identity real imag view_as_real
    view_as_complex broadcast_to atleast_2d atleast_3d hsplit vsplit dsplit""".split()
)
