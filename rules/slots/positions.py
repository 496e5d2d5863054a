"""Shifts a text's learned positions, because PEFT's prefixes take the first positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery import LiveSite, Rule, Site, SiteError, SlotRule, SurgeryError, rule
from surgery.rules._attention.prefix import listeners
from surgery.rules._virtual_tokens.learned_positions import positions_input


@rule("shifted-positions")
class ShiftedRule(Rule):
    """Adds `by` to the input of an embedding of positions, except at padding. A companion of PrefixRule."""

    by: int = 0
    scalable = False
    routable = False  # most models have one row of positions for the whole batch
    why_not_merged = "it changes which positions are embedded"

    def rewrite(self, site: Site) -> None:
        positions, padding = _positions(site)
        site.replace(positions, site.apply(shift_positions, positions, self.by, padding))

    slot_kind = "shift"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        return ShiftSlotRule()

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return {"by": torch.tensor([self.by])}


@rule("shift-slot")
class ShiftSlotRule(SlotRule):
    """ShiftedRule's slot: adds a tensor, at first zero, to the input of an embedding of positions."""

    scalable = False
    identity = True
    slot_kind = "shift"

    def rewrite(self, site: Site) -> None:
        by, (positions, padding) = site.buffer("by", torch.zeros(1, dtype=torch.long)), _positions(site)
        site.replace(positions, site.apply(shift_positions, positions, by, padding))

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return ShiftedRule(by=int(tensors["by"])), {}


def _positions(site: Site) -> tuple[Tensor, int | None]:
    """Returns the positions in the call of an embedding, and the position of padding."""
    name = positions_input(site.module)
    if name is None:
        what = f"a prefix can't shift the positions of a {site.base_class.__name__}"
        raise SiteError(what, where=site.path, why="it is neither a plain nn.Embedding nor takes position_ids")
    return (site.input, getattr(site.module, "padding_idx", None)) if name == "" else (site.inputs[name], -1)


def require_module(site: Site, name: str) -> bool:
    """Raises `SiteError` if the model has no module of this name: companions may match no module."""
    model = (*site.owners, site.module)[0]
    if not any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules()):
        raise SiteError(
            f"{site.label} shifts the positions of {name}, and the model has no module of that name", where=site.path
        )
    return True


def shift_positions(positions: Tensor | None, by: int | Tensor, padding: int | None) -> Tensor:
    """Returns the positions of a text after a prefix. The text from which a prefix is fitted keeps its positions."""
    if positions is None:
        why = "the embedding computes them by itself if a call has none"
        raise SurgeryError("a prefix can't shift the text's positions", why=why, fix="pass position_ids")
    if listeners:
        return positions
    later = positions + by
    return later if padding is None else later.where(positions != padding, positions)
