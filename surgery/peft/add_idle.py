"""A new adapter beside those that are live, and idle itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from surgery.lifecycle.switching import check_none_merged, switch, weights_now
from surgery.patterns.wrappers import unwrap
from surgery.state.in_use import check_free
from surgery.state.records import model_state
from surgery.transaction.undo_log import Journal

__all__ = ["new_adapters_idle"]


@contextmanager
def new_adapters_idle(model: nn.Module) -> Iterator[None]:
    """An adapter that is put on inside the block is idle afterwards, and what was live is; a model's first stays live.

    Meanwhile no others are live, but those that can't be idle (PiSSA): so it may be one that is never live with them,
    such as a head of its own (TrainRule). All or nothing: where it can't be idle, it is gone again.
    """
    model = unwrap(model)
    state = model_state(model)
    if state is None:
        yield
        return
    check_free(model)
    check_none_merged(state)
    before = weights_now(state)
    with Journal():  # what the verbs inside note, too
        switch(model, {name: weight for name, weight in before.items() if state.standing[name].in_base})
        yield
        switch(model, before)
