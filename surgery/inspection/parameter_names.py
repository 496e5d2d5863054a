"""The tensors of adapters that a rule's lines use, and their names in these lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import fx

from surgery.inspection.adapter_modules import adapter_of
from surgery.inspection.function_names import identifier

__all__ = ["name_parameters", "parameters_in"]


def parameters_in(graph: fx.Graph) -> dict[str, str]:
    """The paths of adapters' tensors that rules alone use, each with the rule that uses it first."""
    found: dict[str, str] = {}
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("adapters."):
            users = sorted(node.users, key=place.__getitem__)
            alone = users and all(user.meta.get("surgery") for user in users)
            if users and all(adapter_of(user) is not None for user in users):
                continue  # a call of the adapter's module, which is written with the adapter
            found[str(node.target)] = users[0].meta["surgery"] if alone else ""
    return {path: origin for path, origin in found.items() if origin}


def name_parameters(parameters: Sequence[tuple[str, str]], taken: Collection[str]) -> dict[str, str]:
    """Names for adapters' tensors, given as (path, origin): their own, with the adapter's where they are not alone."""
    parts = {path: path.split(".")[1:] for path, _ in parameters}
    count = Counter(rest[-1] for rest in parts.values())
    found: dict[str, str] = {}
    for path, rest in parts.items():
        name = identifier(rest[-1] if count[rest[-1]] == 1 and rest[-1] not in taken else "_".join(rest))
        while name in taken or name in found.values():
            name += "_"
        found[path] = name
    return found
