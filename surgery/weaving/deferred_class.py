"""Generated classes whose forward is written at the first call, for sites with many live rules.

Each adapter that is added beside live adapters gives the site a new class, but only the last class is called. Writing
all the classes at once would take time in proportion to the square of the number of adapters.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from surgery.forward.tape import Tape

__all__ = ["DeferredRecipe", "are_independent", "ensure_written", "deferred_forward"]


class DeferredRecipe:
    """A placeholder for a class's recipe. `write` sets the class's recipe and generated forward."""

    def __init__(self, write: Callable[[type[nn.Module]], None]):
        self.write = write


def are_independent(tapes: Collection[Tape]) -> bool:
    """Whether edits that can each be written alone can also be written together.

    They can if no edit computes a replacement from a value that another edit replaces, because then no value depends
    on itself. Edits of the output alone can't cause this, because the output is computed last.
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


def ensure_written(cls: type[nn.Module]) -> type[nn.Module]:
    """Write the forward of a deferred class. Returns the same class."""
    if isinstance(vars(cls).get("_surgery_recipe"), DeferredRecipe):
        with _lock:
            recipe = vars(cls)["_surgery_recipe"]
            if isinstance(recipe, DeferredRecipe):
                recipe.write(cls)
    return cls


def deferred_forward(
    signature: inspect.Signature, explain: Callable[[Exception, nn.Module], Exception], holder: list[type[nn.Module]]
) -> Callable[..., Any]:
    """Returns a forward that writes the generated forward of the class in `holder`, and runs it.

    It stays the class's forward, because bound methods and compiled code refer to it. `holder` gets the class after
    this call.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _ensure_written(holder, explain, self)
        return holder[0]._surgery_generated_forward(self, *args, **kwargs)  # type: ignore[operator]

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[self_parameter, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _ensure_written(
    holder: list[type[nn.Module]], explain: Callable[[Exception, nn.Module], Exception], module: nn.Module
) -> None:
    try:
        ensure_written(holder[0])
    except Exception as error:
        raise explain(error, module)  # noqa: B904


_ensure_written._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler runs it, and traces the generated forward
_lock = threading.RLock()
