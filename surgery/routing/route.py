"""`route`: one adapter for each row of a batch.

Inside a block, each site has a class that checks whether the calling thread routes. If so, the site runs its plan
(`surgery.routing.site_plan`); otherwise it runs as before. So threads route independently on one model, and the end of
a block restores the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from surgery.errors import SurgeryError
from surgery.rewritten_model.verb_root import rewritten
from surgery.routing.routed_classes import RoutedModel, lock, routed_models
from surgery.routing.routing_block import RoutingBlock
from surgery.routing.thread_state import thread_routing
from surgery.state import in_use
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.neutral_context import neutral
from surgery.transaction.undo_log import Journal

__all__ = ["route"]


@contextmanager
def route(model: nn.Module, adapters: Sequence[str | None], *, check: bool = True) -> Iterator[None]:
    """Run each row of a batch with its own adapter inside a `with` block.

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

    The adapters that are live outside the block, and their weights, do not matter inside. In training, gradients go to
    the rows' adapters; with gradient checkpointing, call `backward` inside the block. In transformers' `generate`, a
    row's beams use its adapter. Each thread has its own block. While a block is open, no thread can apply, activate,
    merge or remove.

    Low-rank branches of all rows run as two batched products; other rules run on each adapter's rows separately. For
    each site with low-rank branches, a block keeps at most two copies of its adapters' tensors until it ends. A changed
    tensor is copied again, except after changes through `.data`, which torch does not count.

    Args:
        model: the model.
        adapters: the name of an adapter for each row of the batch; None: the base.
        check: whether to verify that the rows of the batch come first in each module's input. If shapes do not show
            it, a few rows are run in two orders.

    Raises:
        SurgeryError: an unknown name, a call with another number of rows, a merged model, a rule that can't be routed,
            or a nested block on the same model. It is raised before the call runs.

    PEFT: `adapter_names` of a forward.
    """
    model, state = rewritten(model)
    if any(block.model is model for block in thread_routing.routings):
        raise SurgeryError("a block of route(model, …) is open in this thread", fix="leave it first")
    with in_use.routing(model):
        with collector_waits():
            routing = RoutingBlock(model, state, adapters, check)
        with _installed(routing):
            before = thread_routing.routings, thread_routing.plans
            try:
                try:
                    thread_routing.routings = (*thread_routing.routings, routing)
                    thread_routing.plans = (
                        {**thread_routing.plans, **routing.plans} if thread_routing.plans else routing.plans
                    )
                    yield
                finally:
                    thread_routing.routings, thread_routing.plans = before
            finally:  # again, in case an interrupt stopped the first
                thread_routing.routings, thread_routing.plans = before
                routing.plans.clear()


@contextmanager
def _installed(routing: RoutingBlock) -> Iterator[None]:
    """Give the sites classes that run plans while at least one block needs them, and let the rows' adapters train."""
    model, shared = routing.model, None
    try:
        try:
            with lock, neutral(model), Journal() as journal, collector_waits():
                shared = routed_models.get(model) or RoutedModel()
                shared.enter(routing, journal)
            yield
        finally:
            if shared is not None:
                shared.leave(routing)
    finally:  # again, in case an interrupt stopped the first
        if shared is not None:
            shared.leave(routing)
