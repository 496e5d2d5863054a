"""Activation steering: adds a direction to the hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SiteError, SlotRule, rule
from surgery.rules._shared import combining, fields
from surgery.rules._shared.hidden_states import at_positions, features_of, positions_of

_Numbers = dict[str, tuple[float, ...]] | tuple[float, ...] | None


@rule("steer")
class SteerRule(SlotRule):
    """h + scale · direction, at chosen positions.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import SteerRule
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> before = model(torch.ones(1, 3)).detach()
    >>> _ = apply_rules(model, [SteerRule("0", direction=[1.0, -1.0], scale=0.5)])
    >>> model(torch.ones(1, 3)).detach() - before
    tensor([[ 0.5000, -0.5000]])

    Works on any module that returns a hidden state (…, length, features), alone or first in a tuple or ModelOutput. The
    tensor `direction` is (features), frozen by default. The rule can't be merged.

    Args:
        direction: numbers or a tensor (features), or a mapping from paths to these. They become plain numbers, so the
            rule can be saved. Default None: zeros, to be trained or loaded.
        scale: factor of the direction; default 1.
        positions: "all" (default), or such as "f7+l7" (see ReftRule).
        trainable: whether training moves the direction; default False.
        features: the hidden state's size; default None: read from the direction or the module.

    Raises:
        RuleError: a field is out of range.

    Sources: Turner et al. 2023, arXiv:2308.10248 (activation addition); Rimsky et al. 2024, arXiv:2312.06681 (CAA).
    """

    direction: Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor] | None = None
    scale: float = 1.0
    positions: str = "all"
    trainable: bool = False
    features: int | None = None

    why_not_merged = "it edits the hidden state a module returns, for which the module may have no bias"

    def validate(self) -> None:
        try:
            object.__setattr__(self, "direction", _numbers(self.direction))
        except (TypeError, ValueError):
            raise self.bad("direction", "a list of numbers, a tensor, or a mapping from paths to such") from None
        fields.numbers(self, "scale")
        fields.whole(self, "features", optional=True)
        fields.one_of(self, "trainable", True, False)
        if positions_of(self.positions) == ():
            raise self.bad("positions", "'all', or such as 'f7+l7', 'f1' or 'l2'")

    def direction_at(self, path: str) -> tuple[float, ...] | None:
        numbers = cast(_Numbers, self.direction)  # as `validate` left it
        return numbers.get(path) if isinstance(numbers, dict) else numbers

    def check(self, module: nn.Module, path: str) -> str | None:
        direction, features = self.direction_at(path), features_of(module, self.features)
        if isinstance(self.direction, dict) and direction is None:
            return f"direction has none for it, only for {', '.join(self.direction)}"
        if direction is None or not isinstance(features, int):
            return features if isinstance(features, str) and (direction is None or "give" not in features) else None
        return None if len(direction) == features else f"it has {features} features, and the direction {len(direction)}"

    def rewrite(self, site: Site) -> Tensor:
        direction, size = self.direction_at(site.path), features_of(site.module, self.features)
        start = torch.zeros(int(size)) if direction is None else torch.tensor(direction)
        added = site.param("direction", start, dtype=site.dtype, trainable=self.trainable) * self.scale
        hidden, chosen = site.hidden, positions_of(self.positions)
        new = (hidden + added).to(hidden.dtype)
        return site.with_hidden(new if chosen is None else site.apply(at_positions, new, hidden, *chosen))

    slot_kind = "steer"
    why_no_slot = "the adapters steer at other positions"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        steers = [cast(SteerRule, rule) for rule in rules]
        if len({steer.positions for steer in steers}) > 1:
            return None
        sizes = [steer.features or len(steer.direction_at(path) or ()) for steer in steers]
        return SteerRule(positions=steers[0].positions, features=max(sizes) or None)

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        if cast(SteerRule, slot).positions != self.positions:
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot steers at other positions", where=site.path, fix=fix)
        return {"direction": site.params["direction"] * self.scale}

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combining.linear_in_tensors(self, shares, how, "direction", "trainable")


def _numbers(direction: Any) -> Any:
    if direction is None:
        return None
    if isinstance(direction, Mapping):
        return {str(path): _numbers(value) for path, value in direction.items()}
    numbers = direction.tolist() if isinstance(direction, Tensor) else direction
    return tuple(float(number) for number in numbers)
