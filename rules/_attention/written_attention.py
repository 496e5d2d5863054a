"""Finds attention that a forward writes out itself: the structure of a softmax, or torch's own function."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from surgery import Site, SiteError, as_digraph, class_of

__all__ = ["FOR_THE_TEXT", "WrittenAttention", "may_write_attention", "written_attention"]

# Operations of a graph, by the names of `as_digraph`.
_PRODUCTS = frozenset({"matmul", "baddbmm"})
_NAMED = _PRODUCTS | {"bmm", "einsum"}
_ALONG = frozenset("to contiguous float double half bfloat16 type type_as clone detach dropout".split())
FOR_THE_TEXT = frozenset("add sub masked_fill where clamp clamp_min max maximum min minimum".split())
_ON_THE_WAY = _ALONG | FOR_THE_TEXT | frozenset("mul div tanh view".split())


class WrittenAttention(NamedTuple):
    """One attention in a graph: its nodes, its number of heads, and the sizes of keys and values."""

    graph: Any  # as a networkx.DiGraph
    root: fx.Node  # the result
    query: fx.Node
    heads: int
    sizes: tuple[int, int]
    queries: int  # heads of the queries
    to_scores: tuple[fx.Node, ...] = ()  # from the product of queries and keys to what the softmax takes
    to_context: tuple[fx.Node, ...] = ()  # from the softmax to the product with the values
    own: bool = True  # keys come from where the queries come from


def may_write_attention(module: nn.Module) -> bool:
    """Whether the module's own code names a softmax and a product, or torch's attention. This needs no tracing."""
    names = _named_by(class_of(module))
    softmax = "softmax" in names or any(isinstance(child, nn.Softmax) for child in module.children())
    return "scaled_dot_product_attention" in names or softmax and bool(names & _NAMED)


@functools.cache
def _named_by(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name.lower() for name in _names(kind, "forward", set()))


def _names(kind: type, method: str, visited: set[str]) -> set[str]:
    """Returns the names in a method's code, and those in the methods of the class that it names."""
    visited.add(method)
    code = getattr(inspect.unwrap(getattr(kind, method)), "__code__", None)
    names: set[str] = set()
    waiting = [code] if code is not None else []
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        names.update("matmul" for step in dis.get_instructions(code) if step.argrepr in ("@", "@="))
        waiting += [constant for constant in code.co_consts if inspect.iscode(constant)]
    own = [name for name in names - visited if inspect.isfunction(inspect.getattr_static(kind, name, None))]
    return names.union(*(_names(kind, name, visited) for name in own if not hasattr(nn.Module, name)))


def written_attention(site: Site) -> WrittenAttention:
    """Returns the one attention that the site's forward writes out. `SiteError` if it is not exactly one."""
    graph = as_digraph(site.graph, site.module)
    graph.graph["same"] = _same_inputs(site)
    heads = next((shape[0] for name in ("key", "value") if (shape := site.shape_of(name))), None)
    candidates: list[WrittenAttention | str] = []
    for node, data in graph.nodes(data=True):
        if data["operation"] == "scaled_dot_product_attention":
            candidates.append(_function_attention(graph, node))
        if data["operation"] == "softmax" and _over_last(data):
            candidates += [_softmax_attention(graph, node, way, heads) for way in _ways_to_context(graph, node)]
    if len(candidates) != 1 or isinstance(candidates[0], str):
        why = (
            candidates[0]
            if len(candidates) == 1
            else f"it computes {len(candidates) or 'no'} products of a softmax and values"
        )
        raise SiteError(
            f"{site.label} finds no attention that it can extend in this {site.base_class.__name__}",
            where=site.path,
            why=str(why),
            fix="target modules that compute one softmax(q kᵀ) v, or call scaled_dot_product_attention",
        )
    return candidates[0]


def _over_last(data: Any) -> bool:
    dim = data["operands"][1] if len(data["operands"]) > 1 else None
    return data["shape"] is not None and dim in (-1, len(data["shape"]) - 1)


def _function_attention(graph: Any, node: fx.Node) -> WrittenAttention | str:
    query, key, value = graph.nodes[node]["operands"][:3]
    shapes = [graph.nodes[operand]["shape"] for operand in (query, key, value)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return "its queries, keys and values are not (batch, heads, positions, size)"
    sizes, own = (shapes[1][3], shapes[2][3]), _is_own(graph, query, key)
    return WrittenAttention(graph, node, query, shapes[1][1], sizes, shapes[0][1], own=own)


def _softmax_attention(
    graph: Any, softmax: fx.Node, after: list[fx.Node], known_heads: int | None
) -> WrittenAttention | str:
    scores, value = graph.nodes[softmax]["operands"][0], graph.nodes[after[-1]]["operands"][1]
    ways = list(_ways_to_product(graph, scores)) if isinstance(scores, fx.Node) else []
    if len(ways) != 1:
        return f"{len(ways) or 'no'} products of queries and keys lead to the softmax"
    product = graph.nodes[ways[0][0]]
    query, key = product["operands"][1:3] if product["operation"] == "baddbmm" else product["operands"][:2]
    q, k, v = (graph.nodes[node]["shape"] for node in (query, key, value))
    if any(_factor(graph, node)[-1:] not in ((), (1,)) for node in (*ways[0], *after)):
        return "its scores are multiplied by a number for each key"
    heads = [shape[-3] if len(shape) > 3 else known_heads or _heads(graph, query, shape[0]) for shape in (q, k)]
    if len(q) != len(k) or min(len(q), len(v)) < 3 or heads[0] is None or heads[1] is None:
        return "batch and heads can't be told apart (an example of another batch size may help)"
    sizes, own = (k[-2], v[-1]), _is_own(graph, query, key)
    return WrittenAttention(graph, after[-1], query, heads[1], sizes, heads[0], tuple(ways[0]), tuple(after), own)


def _ways_to_context(graph: Any, softmax: fx.Node) -> Iterator[list[fx.Node]]:
    """Yields the paths from a softmax to products with values."""
    waiting = [[softmax]]
    while waiting:
        way = waiting.pop()
        for user in graph.successors(way[-1]):
            data = graph.nodes[user]
            if data["operation"] == "matmul" and data["operands"][0] is way[-1]:
                yield [*way, user]
            elif data["operation"] in (*_ALONG, "mul", "view") and data["operands"][0] is way[-1] and len(way) < 12:
                waiting.append([*way, user])


def _ways_to_product(graph: Any, node: fx.Node) -> Iterator[list[fx.Node]]:
    """Yields the paths from products of queries and keys to these scores, each in the order of computation."""
    waiting = [[node]]
    while waiting:
        way = waiting.pop()
        data = graph.nodes[way[0]]
        if data["operation"] in _PRODUCTS:
            yield way
        elif data["operation"] in _ON_THE_WAY and len(way) < 30:
            waiting += [[operand, *way] for operand in data["operands"] if isinstance(operand, fx.Node)]


def _factor(graph: Any, node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of the tensor that scores are multiplied by, or () if there is none."""
    if graph.nodes[node]["operation"] not in ("mul", "div"):
        return ()
    operands = [operand for operand in graph.nodes[node]["operands"] if isinstance(operand, fx.Node)]
    shapes = [shape for operand in operands[1:] if (shape := graph.nodes[operand]["shape"]) is not None]
    return shapes[0] if shapes else ()


def _heads(graph: Any, query: fx.Node, rows: int) -> int | None:
    """Returns the number of heads in (batch · heads, positions, size), if an earlier shape separates batch and heads.

    None if the example has as many rows as heads: then the order of the two is not known.
    """
    node, batch = query, graph.nodes[hidden]["shape"][0] if (hidden := _hidden(graph)) is not None else None
    for _ in range(12):
        data = graph.nodes[node]
        operands = [operand for operand in data["operands"] if isinstance(operand, fx.Node)]
        if not operands:
            return None
        before = graph.nodes[operands[0]]["shape"]
        if data["operation"] == "view" and before is not None and len(before) == 4:
            certain = before[0] == batch and before[1] != batch and before[0] * before[1] == rows
            return before[1] if certain else None
        if data["operation"] not in (*_ALONG, "mul", "div", "mT", "transpose", "view"):
            return None
        node = operands[0]
    return None


def _is_own(graph: Any, query: fx.Node, key: fx.Node) -> bool:
    """Whether the keys come from an input of the queries, or from an input with an equal value in the example."""
    import networkx

    inputs = [
        {node.name for node in networkx.ancestors(graph, end) if node.op == "placeholder"} for end in (query, key)
    ]
    same = graph.graph["same"]
    return any(
        name in inputs[1] or same.get(name, name) in {same.get(other, other) for other in inputs[1]}
        for name in inputs[0]
    )


def _same_inputs(site: Site) -> dict[str, str]:
    """Returns, for each input with activations, the first input with an equal value in the example."""
    example = site.example
    if example is None:
        return {}
    arguments = inspect.signature(class_of(site.module).forward).bind(site.module, *example[0], **example[1]).arguments
    activations = {
        name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    return {
        name: next(
            other
            for other in activations
            if activations[other].shape == value.shape and torch.equal(activations[other], value)
        )
        for name, value in activations.items()
    }


def _hidden(graph: Any) -> fx.Node | None:
    """Returns the first input with activations."""
    inputs = [node for node, data in graph.nodes(data=True) if data["operation"] == "placeholder"]
    return next((node for node in inputs if (dtype := graph.nodes[node]["dtype"]) and dtype.is_floating_point), None)
