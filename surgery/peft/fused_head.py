"""Calls that compute with the output layer's weight instead of calling the layer, as those of trl's trainers do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from surgery.errors import SurgeryError
from surgery.peft.errors import as_builtin
from surgery.state.adapter_tensors import box_of
from surgery.state.records import Applied, site_state

__all__ = ["fused_head"]

_ARGUMENT = "fused_lm_head"  # trl's: its forward multiplies hidden states by `get_output_embeddings().weight`
_GETTER = "get_output_embeddings"


@contextmanager
def fused_head(model: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Gives a call with a fused output layer the layer's weight as the live adapter has it.

    Raises:
        SurgeryError: the live adapters change the layer's output in another way, which such a call would leave out. It
            is also a ValueError.
    """
    head = getattr(model, _GETTER, lambda: None)() if arguments.get(_ARGUMENT) else None
    state = site_state(head) if head is not None else None
    live = state.live() if state is not None else []
    if head is None or state is None or not live:
        yield
        return
    copies = _copies(head, live)
    if copies is None:
        raise as_builtin(
            SurgeryError(
                f"an adapter on {state.path!r} would have no effect, and would not be trained",
                where=state.path,
                why="this call (fused_lm_head=True) computes with the weight of the output layer and does not call it; "
                f"the live adapters change its output: {', '.join(applied.adapter for applied in live)}",
                fix=f"leave {state.path!r} out of target_modules; modules_to_save=[{state.path!r}] trains its weight",
            )
        )
    own = model.__dict__.get(_GETTER)
    model.__dict__[_GETTER] = lambda: SimpleNamespace(**copies)
    try:
        yield
    finally:
        del model.__dict__[_GETTER]
        if own is not None:
            model.__dict__[_GETTER] = own


def _copies(head: Any, live: list[Applied]) -> dict[str, Any] | None:
    """The weight and the bias that the live adapter has instead of the layer's; None if it does something else."""
    (applied, *more) = live
    box = box_of(head, applied.adapter)
    if more or box is None or applied.rule.to_dict()["rule"] != "train" or applied.standing.weight != 1:
        return None
    return {name: getattr(box, name, getattr(head, name, None)) for name in ("weight", "bias")}
