"""Removes the engine's bookkeeping from a woven graph, and tells the regions, effects and operands of its nodes."""

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

__all__ = ["acts", "blocks_of", "operands", "region_of", "simplify_graph", "writes"]


def simplify_graph(graph: fx.Graph, autocast: tuple[Any, ...]) -> fx.Graph:
    """Simplify a graph in place.

    Calls inside a block such as `torch.no_grad` become plain calls with a region in `meta`. Counted runs become plain
    runs. Checks of an object's parts are removed. `autocast`: the autocast dtypes of the call, for the CPU and for
    other devices, as in a kind of call.
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


def _region(recorded: Any, autocast: tuple[Any, ...]) -> Region:
    """The difference between a region of a traced forward and the region of the call."""
    devices = zip(("cpu", "cuda"), recorded, autocast or (None, None), strict=False)
    changed = [(device, (now or "").removeprefix("torch.")) for device, now, before in devices if now != before]
    return Region(recorded[2], tuple(changed))


def region_of(node: fx.Node) -> Region | None:
    return node.meta.get("region")


def blocks_of(region: Region | None) -> str:
    """The blocks of a region as the text of a `with` line, the outermost first; "" for no region."""
    if region is None:
        return ""
    blocks = []
    if region.inference is not None:
        blocks.append("torch.inference_mode()" if region.inference else "torch.inference_mode(False)")
    if region.gradients is not None:
        blocks.append("torch.enable_grad()" if region.gradients else "torch.no_grad()")
    for device, dtype in region.autocast:
        blocks.append(f"torch.autocast({device!r}, " + (f"torch.{dtype})" if dtype else "enabled=False)"))
    return ", ".join(blocks)


def acts(node: fx.Node) -> bool:
    """Whether a node may have an effect besides its value: it writes, draws random numbers, or is foreign code."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    always_acts = node.op == "call_module" or node.target in (base_forward, decide, check_decision)
    return always_acts or bool({"writes", "draws"} & node.meta.keys()) or is_foreign(node.op, node.target)


def writes(node: fx.Node) -> bool:
    """Whether a node may write: it acts, and not by drawing random numbers alone."""
    return acts(node) and not ("draws" in node.meta and "writes" not in node.meta)


def in_place_method(node: fx.Node) -> bool:
    """Whether a node calls a method that writes to its tensor and returns the tensor."""
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name)


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes in a node's arguments, each as often as it occurs."""
    nodes: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda operand: nodes.append(operand) or operand)
    return iter(nodes)
