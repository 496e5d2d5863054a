"""Finds modules that are called one directly after the other, in a call of a whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import class_of, graph_of

__all__ = ["Chain", "find_chains", "has_hooks"]


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
    """Find pairs of modules of these exact classes, without hooks. Each is called once, and only it has its tensors.

    A pair is left out if a forward reads its tensors, too, such as the weight of an embedding for a tied head.
    """
    graph = graph_of(model, example_inputs)
    data = dict(graph.nodes(data=True))
    calls = Counter(node["path"] for node in data.values() if node["op"] == "call_module")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    reads = {".".join(filter(None, (n["path"], str(n["target"])))) for n in data.values() if n["op"] == "get_attr"}
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
        paths = source["path"], node["path"]
        pair = [model.get_submodule(path) for path in paths]
        single = all(owners[id(p)] == 1 for module in pair for p in module._parameters.values() if p is not None)
        read = {f"{path}.{name}" for path in paths for name in ("weight", "bias")} & reads
        if not single or read or any(map(has_hooks, pair)):
            continue
        if [class_of(module) for module in pair] == [source["type"], node["type"]]:
            chains.append(Chain(source["path"], node["path"], source["shape"]))
    return chains


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind."""
    return any(bool(getattr(module, name)) for name in vars(module) if name.endswith("_hooks"))
