"""`RoutingBlock`: the adapters of the rows, the plans of the sites, and the running call of one `route` block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.switching import check_none_merged, check_settled
from surgery.rewritten_model.structural_adapters import check_not_structural
from surgery.routing.batch_layout import check_rows_first
from surgery.routing.joint_rewrite import routes_itself
from surgery.routing.rows import RowOwners, RowsError
from surgery.routing.site_plan import RoutedCall, plan_of
from surgery.routing.thread_state import thread_routing
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import ModelState, site_state

__all__ = ["RoutingBlock", "RowCountError"]


class RowCountError(SurgeryError):
    """A call of the model has another number of rows than the block has names."""

    def __init__(self, names: int, rows: int):
        what = f"{names} adapters are named, and the call has {rows} rows"
        super().__init__(what, fix="name one adapter, or None, for each row")
        self.names, self.rows = names, rows


class RoutingBlock:
    """One `route` block: the adapter of each row, the plans of the sites, and the running call."""

    def __init__(self, model: nn.Module, state: ModelState, adapters: Sequence[str | None], check: bool):
        if isinstance(adapters, str) or not adapters:
            raise SurgeryError("route needs a name for each row", why=f"it is given {adapters!r}", fix='["a", None, …]')
        names = [name for name in adapters if name is not None]
        adapter_names(state, names)
        check_not_structural(state, names, "be routed", "leave it out of the rows: it is in force for all of them")
        self.model, self.check = model, check
        self.entries = tuple(_entries(model))
        self.rows = RowOwners(adapters)
        self.names = tuple(name for name in state.adapters if name in names)
        self.alone = len(set(adapters)) == 1
        # The running call: its entry (the model, or the encoder, which `generate` calls directly), size and arguments.
        self.entry: nn.Module | None = None
        self.batch: int | None = None
        self.arguments: tuple[tuple, dict[str, Any]] | None = None
        touched = [name for name, status in state.standing.items() if status.live or name in self.names]
        self.modules = list({id(m): m for name in touched for m in state.places[name].modules}.values())
        records = [check_settled(module) for module in self.modules]
        check_none_merged(state)
        _check_routable(state, self.names, self.alone)
        self.plans: dict[int, RoutedCall | None] = {}
        rules = state.rules_at(set(names))
        for module, site in zip(self.modules, records, strict=True):
            # A joint rewrite may raise an error, so these plans are made before anything runs. Others wait for a call.
            eager = any(routes_itself(applied.rule) for applied in rules.get(id(module), ()))
            self.plans[id(module)] = plan_of(self, module, site) if eager else None

    def plan(self, module: nn.Module) -> RoutedCall:
        """Make the plan of a site and store it for the next calls."""
        site = site_state(module)
        assert site is not None
        plan = plan_of(self, module, site)
        self.plans[id(module)] = plan
        if thread_routing.plans is not None:
            thread_routing.plans[id(module)] = plan
        return plan

    def enter(self, entry: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the batch size and arguments of a call of the model, or of its encoder; check the number of rows."""
        if self.entry is not None and entry is not self.model:
            return
        size = _batch_of(args, kwargs)
        if size is not None and size != self.rows.count and not (size % self.rows.count == 0 and _generating()):
            raise RowCountError(self.rows.count, size)
        self.entry, self.batch, self.arguments = entry, size, (args, kwargs)

    def leave(self, entry: nn.Module) -> None:
        """Forget the running call when its entry returns."""
        if entry is self.entry:
            self.entry = self.batch = self.arguments = None

    def size_of(self, module: nn.Module, value: Tensor) -> int:
        """The size of a tensor's first dimension. Raises `SurgeryError` unless the batch's rows come first in it."""
        size = value.shape[0] if value.dim() else 0
        batch = self.batch or self.rows.count
        shown = size == batch and value.dim() > 2 and size not in value.shape[1:-1]
        if not shown and self.check and size and size % self.rows.count == 0:
            check_rows_first(self.entry or self.model, self.modules, module, tuple(value.shape), batch, self.arguments)
        if not size or size % self.rows.count:
            raise RowsError(
                f"{self.rows.count} adapters are named, and a module is called with {tuple(value.shape)}",
                where=site_state(module).path,  # type: ignore[union-attr]
                why="the batch's rows do not come first there, or are not all there",
                fix="exclude it from the adapters, or use one adapter for all rows",
            )
        return size


def _check_routable(state: ModelState, names: Sequence[str], alone: bool) -> None:
    """Raise `SurgeryError` unless all rules of these adapters work on rows and the base has its own weights."""
    for name, standing in state.standing.items():
        if name not in names and not standing.in_base:
            continue
        for module, rules in state.places[name]:
            for applied in rules:
                why = None
                if applied.changed and not (alone and name in names):
                    why = f"{applied.rule.label} changed the base's weights at its start, and rows without it need them"
                elif name in names and applied.inside:
                    why = "it looks into the forward, which has a graph for each kind of call"
                elif name in names and not alone and not routes_itself(applied.rule):
                    if not applied.rule.routable:
                        why = "it can't work on some rows of a batch alone"
                    elif any(step.kind == "around" for step in _steps(applied)):
                        why = "it puts functions around others, and does not say how for several adapters (`routed`)"
                if why:
                    site = site_state(module)
                    raise SurgeryError(
                        f"{applied.rule.label} [{name}] can't be routed",
                        where=site.path if site is not None else None,
                        why=why,
                        fix="use it for whole batches: activate, using",
                    )


def _steps(applied: Any) -> list[Any]:
    return applied.layer.tape.steps if applied.layer is not None else []


def _batch_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The batch size of a call of the model: the first dimension of its main input, or else of its first tensor."""
    named = [kwargs[name] for name in _TEXTS if name in kwargs]
    for value in (*args[:1], *named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None


def _generating() -> bool:
    """Whether transformers' `generate` calls the model; it repeats rows for beams."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a user or `generate` calls with a batch: the model, and its encoder if it has one."""
    yield model
    try:
        encoder = model.get_encoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return
    if isinstance(encoder, nn.Module) and encoder is not model and any(encoder is inner for inner in model.modules()):
        yield encoder


_TEXTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")
