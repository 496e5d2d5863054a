"""The steps of a tape: plain data in which each value of the forward is a Ref."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from surgery.forward.context_regions import Region

__all__ = ["NOTHING", "OPS", "Ref", "Step", "is_whole_number", "refs_for_values", "refs_in", "shift_steps", "thawed"]


class Ref(NamedTuple):
    """A value by what it is: ("input", name), ("output", ""), ("state", path), ("param", name), ("op", step).

    In a forward that is held as a graph also ("inside", node), what an operation's result is at present, and
    ("made", node), what the operation itself gives, before what rules put in its place. `read`: the node before which
    it is read, as an operand of a match that ends there; then it follows what the rule puts in its place.
    """

    kind: str
    key: str | int
    read: str = ""


class Step(NamedTuple):
    """One edit. kind: "function", "method", "attribute", "module" (a child), "own" (the site's own operation once more:
    args its inputs, kwargs its tensors), "around" (what makes a function around those from registries, or around one
    operation), or "replace" (args: what is replaced, by what; kwargs: operations in which alone it is).

    `region`: the blocks (torch.no_grad, torch.autocast) around it. `late`: the rewrite asked for the output before.
    `training`: the mode that it is for alone, where Python went by that."""

    kind: str
    target: Any
    args: Any
    kwargs: Any
    region: Region | None = None
    late: bool = False
    training: bool | None = None


def shift_steps(frozen: Any, by: int) -> Any:
    if isinstance(frozen, Ref):
        return frozen._replace(key=int(frozen.key) + by) if frozen.kind == "op" else frozen
    if isinstance(frozen, tuple) and frozen[:1] != ("constant",):
        return tuple([shift_steps(item, by) for item in frozen])
    return frozen


def is_whole_number(frozen: Any) -> bool:
    return not isinstance(frozen, Ref) and frozen[0] == "constant" and type(frozen[1][2]) is int


def refs_for_values(step: Step) -> tuple[Any, Any]:
    """The arguments of a step, each value as its `Ref`."""
    return thawed(step.args, lambda ref: ref), thawed(step.kwargs, lambda ref: ref)


def refs_in(frozen: Any) -> Iterator[Ref]:
    """The values named in what `Tape._frozen` froze."""
    if isinstance(frozen, Ref):
        yield frozen
    elif isinstance(frozen, tuple) and frozen[:1] != ("constant",):
        for item in frozen:
            yield from refs_in(item)


NOTHING = ("dict", ())


OPS = {"function": "call_function", "method": "call_method"}


def thawed(frozen: Any, resolve: Callable[[Ref], Any]) -> Any:
    """What `Tape._frozen` froze, with each `Ref` replaced by what `resolve` says."""
    if isinstance(frozen, Ref):
        return resolve(frozen)
    kind, content = frozen
    if kind == "constant":
        return content[2]
    if kind == "dict":
        return {key: thawed(item, resolve) for key, item in content}
    items = [thawed(item, resolve) for item in content]
    return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items
