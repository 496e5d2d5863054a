"""Finds modules that are called one directly after the other, in a call of a whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import class_of, graph_of

__all__ = ["Chain", "find_chains"]


@dataclass(frozen=True)
class Chain:
    """Two modules: all that the first returns goes to the second, and to nothing else.

    Attributes:
        first, second: their paths.
        shape: the shape of the value between them, in the example.
    """

    first: str
    second: str
    shape: tuple[int, ...] | None


def find_chains(
    model: nn.Module, example_inputs: Any, first: tuple[type, ...], second: tuple[type, ...]
) -> list[Chain]:
    """Find pairs of modules of these exact classes. Each is called once in the example, and its tensors are its own."""
    graph = graph_of(model, example_inputs)
    data = dict(graph.nodes(data=True))
    calls = Counter(node["path"] for node in data.values() if node["op"] == "call_module")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    chains = []
    for name, node in data.items():
        if node["op"] != "call_module" or node["type"] not in second or calls[node["path"]] != 1:
            continue
        (before, *others) = [*graph.predecessors(name)] or [None]
        source = data.get(before)
        if others or source is None or source["op"] != "call_module" or source["type"] not in first:
            continue
        if calls[source["path"]] != 1 or [*graph.successors(before)] != [name]:
            continue
        pair = [model.get_submodule(path) for path in (source["path"], node["path"])]
        single = all(owners[id(p)] == 1 for module in pair for p in module._parameters.values() if p is not None)
        if single and [class_of(module) for module in pair] == [source["type"], node["type"]]:
            chains.append(Chain(source["path"], node["path"], source["shape"]))
    return chains
