"""Finds operations between those of a match (dropout, detach) that a rewrite drops without reading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgery.forward.tape import Tape
from surgery.forward.tape_steps import refs_in
from surgery.structures.op_aliases import arguments_in, canonicalise

__all__ = ["Passage", "find_dropped_ops"]


@dataclass(eq=False)
class Passage:
    """The nodes that one match passes over, and whether the rule has read them (`Occurrence.passed`)."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    was_read: bool = False


def find_dropped_ops(
    passages: Sequence[Passage], graph: fx.Graph, module: nn.Module, tape: Tape
) -> Iterator[tuple[str, str]]:
    """Yields the operations that no longer reach the forward's output, as (kind, sentence with the place).

    Casts are ignored, because a replaced value keeps its dtype.
    """
    unread = [passage for passage in passages if not passage.was_read and passage.nodes]
    replaced = {ref.key for ref in tape.replaced_refs() if ref.kind in ("inside", "output")}
    if not unread or not replaced:
        return
    before, after = _nodes_reaching_output(graph, None), _nodes_reaching_output(graph, tape)
    for passage in unread:
        for node in passage.nodes:
            kind = _dropped_kind(node, module)
            if kind and node in before and node not in after:
                yield (
                    kind,
                    f"what it puts in the place of {passage.root} leaves out {node}, a {kind} inside of the match",
                )


def _dropped_kind(node: fx.Node, module: nn.Module) -> str | None:
    """Returns "dropout" or "detach" for an operation of this kind; None for others, and for dropout with p = 0."""
    child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = canonicalise(node.op, node.target, arguments_in(node), node.kwargs, child).operation
    if kind == "dropout":
        args = node.args[2:] if getattr(node.target, "__name__", "") == "in_region" else node.args
        chance: Any = args[1] if len(args) > 1 else node.kwargs.get("p", 0.5)
        return None if (chance if child is None else getattr(child, "p", 0.5)) == 0 else kind
    return kind if kind == "detach" else None


def _nodes_reaching_output(graph: fx.Graph, tape: Tape | None) -> set[fx.Node]:
    """Returns the nodes whose own results reach the output, with the replacements of a tape."""
    below: dict[Any, list[Any]] = {}  # value → its sources: ("made", node), ("now", node), ("op", step)
    inputs = {str(node.target).lstrip("*"): node for node in graph.nodes if node.op == "placeholder"}
    named = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        below["now", node] = [("made", node)]
        below["made", node] = [("now", source) for source in node.all_input_nodes]
    output = graph.output_node()
    for index, step in enumerate(tape.steps if tape is not None else ()):
        refs = [*refs_in(step.args), *refs_in(step.kwargs)]
        values: list[Any] = []
        for ref in refs[1:] if step.kind == "replace" else refs:
            node = {"output": output, "base": output}.get(ref.kind) or named.get(ref.key) or inputs.get(str(ref.key))
            values += [("op", ref.key)] if ref.kind == "op" else [("made", node), ("now", node)] if node else []
        if step.kind != "replace":
            below["op", index] = values
            continue
        old = refs[0]
        node = output if old.kind == "output" else named.get(old.key)
        users = [named[ref.key] for ref in step.kwargs if ref.key in named] if step.kwargs else []
        for user in users:
            below["made", user] = [*below["made", user], *values]
        if node is not None and not users:
            # A new value that is computed from the old one still needs the old one's sources.
            below["now", node] = [value for value in values if value != ("now", node)]
    visited: set[Any] = set()
    waiting: list[Any] = [("now", output)]
    while waiting:
        value = waiting.pop()
        if value not in visited:
            visited.add(value)
            waiting += below.get(value, ())
    return {node for kind, node in visited if kind == "made"}
