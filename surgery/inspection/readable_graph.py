"""A woven graph without the engine's own bookkeeping, and what holds for its nodes: regions, effects, uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from surgery.forward.context_regions import Inside, Region
from surgery.forward.parameter_view import base_forward
from surgery.forward.repeated_runs import RunCount, check_skipped_forward, repeat_forward, repeat_method, repeat_module
from surgery.forward.side_effects import is_foreign
from surgery.tracing.decisions import check_decision, decide, decide_parts
from surgery.tracing.guards import in_region

__all__ = ["acts", "blocks_of", "operands", "region_of", "simplified", "writes"]


def simplified(graph: fx.Graph, autocast: tuple[Any, ...]) -> fx.Graph:
    """The graph, changed in place: calls under `torch.no_grad` and their like are marked with their region, runs that
    are counted are plain runs, and checks of an object's parts are left out.

    `autocast`: what the call runs under on the CPU and on other devices, as a kind of call says it.
    """
    for node in list(graph.nodes):
        if isinstance(node.target, Inside):
            _enter(node, node.target.region, node.target.function, node.args, node.kwargs)
        elif node.target is in_region:
            region, function, *args = node.args
            _enter(node, _region(region, autocast), function, tuple(args), node.kwargs)
        elif node.target is repeat_forward:
            node.target, node.args = base_forward, node.args[1:]
        elif node.target is repeat_module:
            _, module, args, kwargs = node.args
            node.op, node.target, node.args, node.kwargs = "call_module", module.target, tuple(args), dict(kwargs)  # type: ignore
        elif node.target is repeat_method:
            _, _, name, args, kwargs = node.args
            node.op, node.target, node.args, node.kwargs = "call_method", name, tuple(args), dict(kwargs)  # type: ignore
        elif node.target in (check_skipped_forward, decide_parts):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        needless = node.op == "get_attr" or node.target is RunCount or not acts(node) and "needed" not in node.meta
        if not node.users and needless and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph


def _enter(node: fx.Node, region: Region, function: Any, args: Any, kwargs: Any) -> None:
    if isinstance(function, str):
        node.op = "call_method"
    node.target, node.args, node.kwargs = function, args, kwargs
    node.meta["region"] = region


def _region(found: Any, autocast: tuple[Any, ...]) -> Region:
    """A region of a traced forward, against that of the call."""
    devices = zip(("cpu", "cuda"), found, autocast or (None, None), strict=False)
    changed = [(device, (now or "").removeprefix("torch.")) for device, now, before in devices if now != before]
    return Region(found[2], tuple(changed))


def region_of(node: fx.Node) -> Region | None:
    return node.meta.get("region")


def blocks_of(region: Region | None) -> str:
    """The blocks of a region as a `with` line opens them, the outermost first; "" for no region."""
    if region is None:
        return ""
    found = []
    if region.inference is not None:
        found.append("torch.inference_mode()" if region.inference else "torch.inference_mode(False)")
    if region.gradients is not None:
        found.append("torch.enable_grad()" if region.gradients else "torch.no_grad()")
    for device, dtype in region.autocast:
        found.append(f"torch.autocast({device!r}, " + (f"torch.{dtype})" if dtype else "enabled=False)"))
    return ", ".join(found)


def acts(node: fx.Node) -> bool:
    """Whether running a node does more than give a value, as far as can be known: it writes, draws, or is foreign."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    known = node.op == "call_module" or node.target in (base_forward, decide, check_decision)
    return known or bool({"writes", "draws"} & node.meta.keys()) or is_foreign(node.op, node.target)


def writes(node: fx.Node) -> bool:
    """Whether it may write to something: all that acts and does not draw alone."""
    return acts(node) and not ("draws" in node.meta and "writes" not in node.meta)


def in_place_method(node: fx.Node) -> bool:
    """Whether it is a method that writes to its tensor and returns it."""
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name)


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes in a node's arguments, as often as they stand there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda operand: found.append(operand) or operand)
    return iter(found)
