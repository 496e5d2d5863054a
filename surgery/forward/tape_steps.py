"""The steps of a tape: plain data in which each value of the forward is a Ref."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from surgery.forward.context_regions import Region

__all__ = ["NOTHING", "OPS", "Ref", "Step", "is_whole_number", "refs_for_values", "refs_in", "shift_steps", "thaw"]


class Ref(NamedTuple):
    """Names a value: ("input", name), ("output", ""), ("state", path), ("param", name), ("op", step).

    In a forward with a graph also: ("inside", node) is the present result of a node, with the replacements of earlier
    rules, and ("made", node) is the node's own result. `read`: the node before which the value is read, as an operand
    of a match that ends at this node; the value then includes the rule's replacement.
    """

    kind: str
    key: str | int
    read: str = ""


class Step(NamedTuple):
    """One edit.

    Kinds: "function", "method", "attribute" and "module" (a child) are calls. "own" calls the site's own operation
    again: `args` are its inputs, `kwargs` its tensors. "around" wraps functions from registries, or one operation.
    "replace" replaces a value: `args` are the old and the new value, `kwargs` the only operations that see the new one.

    `region`: the blocks (torch.no_grad, torch.autocast) around the step. `late`: the rewrite read the output before.
    `training`: the only mode of the step, if the rewrite branched on the mode.
    """

    kind: str
    target: Any
    args: Any
    kwargs: Any
    region: Region | None = None
    late: bool = False
    training: bool | None = None


def shift_steps(frozen: Any, by: int) -> Any:
    """Add a number to all step indices in a frozen argument."""
    if isinstance(frozen, Ref):
        return frozen._replace(key=int(frozen.key) + by) if frozen.kind == "op" else frozen
    if isinstance(frozen, tuple) and frozen[:1] != ("constant",):
        return tuple([shift_steps(item, by) for item in frozen])
    return frozen


def is_whole_number(frozen: Any) -> bool:
    return not isinstance(frozen, Ref) and frozen[0] == "constant" and type(frozen[1][2]) is int


def refs_for_values(step: Step) -> tuple[Any, Any]:
    """Returns the arguments of a step, with a `Ref` for each value."""
    return thaw(step.args, lambda ref: ref), thaw(step.kwargs, lambda ref: ref)


def refs_in(frozen: Any) -> Iterator[Ref]:
    """Yields the values in an argument that `Tape._freeze` froze."""
    if isinstance(frozen, Ref):
        yield frozen
    elif isinstance(frozen, tuple) and frozen[:1] != ("constant",):
        for item in frozen:
            yield from refs_in(item)


NOTHING = ("dict", ())


OPS = {"function": "call_function", "method": "call_method"}


def thaw(frozen: Any, resolve: Callable[[Ref], Any]) -> Any:
    """Convert an argument back that `Tape._freeze` froze. `resolve` returns the value of a `Ref`."""
    if isinstance(frozen, Ref):
        return resolve(frozen)
    kind, content = frozen
    if kind == "constant":
        return content[2]
    if kind == "dict":
        return {key: thaw(item, resolve) for key, item in content}
    items = [thaw(item, resolve) for item in content]
    return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items
