"""Finds the adapter tensors that a rule's lines use, and chooses their variable names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import fx

from surgery.inspection.adapter_modules import adapter_of
from surgery.inspection.function_names import identifier

__all__ = ["name_parameters", "parameters_in"]


def parameters_in(graph: fx.Graph) -> dict[str, str]:
    """The paths of adapter tensors that only rules use, each with the rule that uses it first."""
    origins: dict[str, str] = {}
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("adapters."):
            users = sorted(node.users, key=place.__getitem__)
            alone = users and all(user.meta.get("surgery") for user in users)
            if users and all(adapter_of(user) is not None for user in users):
                continue  # a call of the adapter's module, which is written with the adapter
            origins[str(node.target)] = users[0].meta["surgery"] if alone else ""
    return {path: origin for path, origin in origins.items() if origin}


def name_parameters(parameters: Sequence[tuple[str, str]], used_names: Collection[str]) -> dict[str, str]:
    """Variables for adapter tensors, given as (path, origin). Equal names get the adapter's as a prefix."""
    parts = {path: path.split(".")[1:] for path, _ in parameters}
    count = Counter(rest[-1] for rest in parts.values())
    names: dict[str, str] = {}
    for path, rest in parts.items():
        name = identifier(rest[-1] if count[rest[-1]] == 1 and rest[-1] not in used_names else "_".join(rest))
        while name in used_names or name in names.values():
            name += "_"
        names[path] = name
    return names
