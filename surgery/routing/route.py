"""`route`: one adapter for each row of a batch. What a site runs meanwhile is its plan (`surgery.routing.site_plan`).

Sites get a class that asks whether the thread that calls them is routing; then the plan for them runs, else what ran
before. So threads route on one model without seeing each other, and a block leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from surgery.errors import SurgeryError
from surgery.model_record.verb_root import rewritten
from surgery.routing.routed_classes import RoutedModel, lock, routed_models
from surgery.routing.routing_block import RoutingBlock
from surgery.routing.thread_state import here
from surgery.state import in_use
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.neutral_context import neutral
from surgery.transaction.undo_log import Journal

__all__ = ["route"]


@contextmanager
def route(model: nn.Module, adapters: Sequence[str | None], *, check: bool = True) -> Iterator[None]:
    """Inside the block each row of a batch runs with an adapter of its own: one name a row, None for the bare base.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, route, using
    >>> from surgery.rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8)).eval()
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    >>> x = torch.randn(3, 8)
    >>> with route(model, ["a", None, "b"]):
    ...     mixed = model(x)
    >>> with using(model, "b"):
    ...     torch.allclose(mixed[2], model(x)[2], atol=1e-6)
    True

    Which adapters are live outside is of no account inside, nor are their weights. In training, gradients go to the
    rows' adapters; call `backward` inside the block where the model recomputes activations (gradient checkpointing).
    In transformers' `generate` a row's beams go with it. Every thread has its own block; while one is open, nobody can
    apply, activate, merge or remove.

    Low-rank branches of all rows run as two batched products; other rules on each adapter's rows by themselves. A
    block keeps, for each site with low-rank branches, at most two copies of its adapters' tensors, and frees them. It
    makes them anew when a tensor was changed, but for changes through `.data`, which torch does not count.

    Raises `SurgeryError` before anything runs for an unknown name, a call of another number of rows, a merged model,
    or a rule that can't be routed. `check=False` does without the proof that a batch's rows come first in a module's
    input, which is made, where shapes alone don't tell, by running a few rows in two orders.
    PEFT: `adapter_names` of a forward.
    """
    model, state = rewritten(model)
    if any(one.model is model for one in here.routings):
        raise SurgeryError("a block of route(model, …) is open in this thread", fix="leave it first")
    with in_use.routing(model):
        with collector_waits():
            routing = RoutingBlock(model, state, adapters, check)
        with _installed(routing):
            before = here.routings, here.plans
            try:
                try:
                    here.routings = (*here.routings, routing)
                    here.plans = {**here.plans, **routing.plans} if here.plans else routing.plans
                    yield
                finally:
                    here.routings, here.plans = before
            finally:  # once more, where it was broken off
                here.routings, here.plans = before
                routing.plans.clear()


# The call of the model ----------------------------------------------------------------------------------------


# Classes of sites while a model is routed ---------------------------------------------------------------------


@contextmanager
def _installed(routing: RoutingBlock) -> Iterator[None]:
    """Sites have a class that asks for plans, as long as one block needs it; adapters of the rows may train."""
    model = routing.model
    with lock, neutral(model), Journal() as journal, collector_waits():
        shared = routed_models.get(model) or RoutedModel()
        shared.enter(routing, journal)
    try:
        try:
            yield
        finally:
            shared.leave(routing)
    finally:  # once more, where it was broken off
        shared.leave(routing)
