"""A class whose forward is written when it is first called: a stack of many rules grows without being written anew.

Each adapter that comes to a site beside live ones makes another stack. Writing every one of them would take time in
proportion to the square of their number, and only the last is called.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from surgery.forward.tape import Tape

__all__ = ["Unwritten", "independent", "settled", "writing_forward"]


class Unwritten:
    """Stands in the place of a class's recipe until `write` gives the class its recipe, and what its forward runs."""

    def __init__(self, write: Callable[[type[nn.Module]], None]):
        self.write = write


def independent(tapes: Collection[Tape]) -> bool:
    """Whether edits of one forward can always be written together where each can be written alone.

    So it is where none makes what it puts into the forward from a value that another replaces there: then no value
    can come to be made from itself. The output is made last, so edits of it alone depend on all others as they are.
    """
    replaced = {ref for tape in tapes for ref in tape.inner_replacements}
    for tape in tapes:
        kinds = {step.kind for step in tape.steps}
        if "around" in kinds or (tape.inner_replacements and "own" in kinds):
            return False
        foreign = tape.mentions - tape.inner_replacements if tape.inner_replacements else ()
        if any(ref in replaced or ref.kind not in ("input", "state", "param", "op", "training") for ref in foreign):
            return False
    return True


def settled(cls: type[nn.Module]) -> type[nn.Module]:
    """The same class, its code written."""
    if isinstance(vars(cls).get("_surgery_recipe"), Unwritten):
        with _lock:
            held = vars(cls)["_surgery_recipe"]
            if isinstance(held, Unwritten):
                held.write(cls)
    return cls


def writing_forward(
    signature: inspect.Signature, told: Callable[[Exception, nn.Module], Exception], of: list[type[nn.Module]]
) -> Any:
    """A forward that has its class written, which will be the one in `of`, and runs what was written.

    It stays the class's forward: what was bound to it, or compiled from it, holds on to it.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _settle(of, told, self)
        return of[0]._surgery_written(self, *args, **kwargs)  # type: ignore[operator]

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _settle(of: list[type[nn.Module]], told: Callable[[Exception, nn.Module], Exception], module: nn.Module) -> None:
    try:
        settled(of[0])
    except Exception as error:
        raise told(error, module)  # noqa: B904


_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler runs it, and traces what was written
_lock = threading.RLock()
