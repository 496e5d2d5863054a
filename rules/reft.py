"""LoReFT: a trained edit of the hidden state inside a low-rank subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, Rule, Site, SiteError, SlotRule, rule
from surgery.rules._shared import complex_weights, fields
from surgery.rules._shared.hidden_states import at_positions, features_of, in_dtype_of, positions_of
from surgery.rules._shared.solving import orthonormal_rows


@rule("reft")
class ReftRule(Rule):
    """h + Rᵀ (W h + b − R h) at chosen positions, where the rows of R are orthonormal.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import ReftRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [ReftRule("0", rank=2)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'R': (2, 16), 'W': (2, 16), 'b': (2,)}

    Works on any module that returns a hidden state (…, length, features), alone or first in a tuple or ModelOutput. R
    is orthonormalised at each call, so training moves it within the orthonormal matrices; an orthonormal `R` stays as
    it is. R starts orthogonal, W and b start as torch's Linear: the output changes from the start. Tensors have the
    dtype and device of LoRA's. The rule can't be merged.

    Args:
        rank: rows of R; default 4.
        positions: "all" (default), or as pyreft writes it "f7+l7": the first and last seven of a call. Padding counts.
            A
            call with one position, such as a step of decoding, is left unchanged.
        dropout: probability of dropout on the edit while training; default 0.
        features: the hidden state's size; default None: read from the module.

    Raises:
        RuleError: a field is out of range. A module whose features are unknown, or fewer than `rank`, is a problem of
            the plan.

    Source: Wu et al. 2024, arXiv:2404.03592 (R is their rotate_layer, W and b their learned_source). PEFT does not have
    it.
    """

    rank: int = 4
    positions: str = "all"
    dropout: float = 0.0
    features: int | None = None

    why_not_merged = "it edits the hidden state a module returns, for which the module has no weight"

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.whole(self, "features", optional=True)
        fields.chance(self, "dropout")
        if positions_of(self.positions) == ():
            raise self.bad("positions", "'all', or such as 'f7+l7', 'f1' or 'l2'")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "its rotation is one of real numbers"):
            return why
        features = features_of(module, self.features)
        if isinstance(features, str):
            return features
        return (
            f"{self.rank} orthonormal rows need as many features; it has {features}" if self.rank > features else None
        )

    def rewrite(self, site: Site) -> Tensor:
        size = features_of(site.module, self.features)
        assert isinstance(size, int)
        R = site.apply(orthonormal_rows, site.param("R", (self.rank, size), nn.init.orthogonal_))
        W = site.param("W", (self.rank, size), lambda W: nn.init.kaiming_uniform_(W, a=math.sqrt(5)))
        bound = 1 / math.sqrt(size)
        b = site.param("b", (self.rank,), lambda b: nn.init.uniform_(b, -bound, bound))
        hidden = site.hidden
        h = site.apply(in_dtype_of, W, hidden)
        edit = (F.linear(h, W, b) - F.linear(h, R)) @ R
        if self.dropout:
            edit = F.dropout(edit, self.dropout, site.training)  # type: ignore[arg-type]  # as it is at each call
        new, chosen = (h + edit).to(hidden.dtype), positions_of(self.positions)
        return site.with_hidden(new if chosen is None else site.apply(at_positions, new, hidden, *chosen))

    slot_kind = "reft"
    why_no_slot = "the adapters edit other positions"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        edits = [cast(ReftRule, rule) for rule in rules]
        if len({edit.positions for edit in edits}) > 1:
            return None
        features = next((edit.features for edit in edits if edit.features is not None), None)
        return ReftSlotRule(positions=edits[0].positions, features=features)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        if cast(ReftSlotRule, slot).positions != self.positions:
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot edits other positions", where=site.path, fix=fix)
        return {**site.params, "R": orthonormal_rows(site.params["R"])}


@rule("reft-slot")
class ReftSlotRule(SlotRule):
    """h + Rᵀ (W h + b − R h), with R used as it is: ReftRule's form in a slot, for any rank.

    >>> from torch import nn
    >>> from surgery.rules.reft import ReftSlotRule
    >>> from surgery import apply_rules
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 3)), [ReftSlotRule("0")])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'R': (2, 3), 'W': (2, 3), 'b': (2,)}

    All tensors start at zero, which changes nothing. Fields and dtypes are ReftRule's.
    """

    positions: str = "all"
    features: int | None = None
    identity = True
    slot_kind = "reft"

    def check(self, module: nn.Module, path: str) -> str | None:
        features = features_of(module, self.features)
        return features if isinstance(features, str) else None

    def rewrite(self, site: Site) -> Tensor:
        size = cast(int, features_of(site.module, self.features))
        R, W, b = site.param("R", (2, size)), site.param("W", (2, size)), site.param("b", (2,))
        hidden, chosen = site.hidden, positions_of(self.positions)
        h = site.apply(in_dtype_of, W, hidden)
        new = (h + (F.linear(h, W, b) - F.linear(h, R)) @ R).to(hidden.dtype)
        return site.with_hidden(new if chosen is None else site.apply(at_positions, new, hidden, *chosen))

    def free(self, tensor: str) -> tuple[int, str] | None:
        return (0, "rank")

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return ReftRule(rank=len(tensors["R"]), positions=self.positions, features=self.features), tensors
