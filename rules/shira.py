"""SHiRA: trains a few entries of the weight, scattered over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, rule
from surgery.rules._linear import delta
from surgery.rules._linear.forward_maps import why_unreadable
from surgery.rules._shared import combining, complex_weights, fields


@rule("shira")
class ShiraRule(Rule):
    """W + Δ: Δ is zero except for rank · (in + out) trained entries, as many numbers as LoRA of that rank has.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import ShiraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [ShiraRule("0", rank=2)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'values': (96,), 'index': (96,)}

    Works on Linear and transformers' Conv1D. `values` is trained. `index` holds the entries' places, row · in + column,
    in rising order. The weight itself is edited, so merging rounds nothing that the live form does not round.

    Args:
        rank: the rank of a LoRA with as many numbers; default 32. PEFT: r.
        random_seed: seed that draws the places, as PEFT's mask_type="random"; default None: torch's global generator.
        init: "identity" (default; zero, PEFT's init_weights=True) or "random" (False: normal).

    Raises:
        RuleError: a field is out of range. More entries than the weight has, or a quantised weight, are problems of the
            plan.

    Source: Bhardwaj et al. 2024, arXiv:2406.13175; PEFT's ShiraConfig, whose defaults these are.
    """

    rank: int = 32
    random_seed: int | None = None
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.whole(self, "random_seed", least=0, optional=True)
        fields.one_of(self, "init", "identity", "random")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        return (
            delta.why_no_map(module)
            or why_unreadable(module, "it changes entries of the weight")
            or delta.more_than_weight(module, self.rank * sum(delta.sizes(module)))
        )

    def rewrite(self, site: Site) -> None:
        count = self.rank * sum(delta.sizes(site))
        values = site.param("values", (count,), 0.0 if self.init == "identity" else nn.init.normal_)
        index = site.buffer("index", torch.zeros((), dtype=torch.long).expand(count))  # drawn by `initialise`
        site.replace(site.weight, self._changed(site, site.weight, values, index))

    def initialise(self, site: LiveSite) -> None:
        out, inner = delta.sizes(site)
        draw = None if self.random_seed is None else torch.Generator().manual_seed(self.random_seed)
        index = site.params["index"]
        index.copy_(torch.randperm(out * inner, generator=draw)[: len(index)].sort().values)

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        values, index = site.params["values"].detach(), site.params["index"]
        return {"weight": self._changed(site, site.weight.detach(), values, index)}

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combining.linear_in_tensors(self, shares, how)

    def _changed(self, site: Site | LiveSite, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
        rows = weight.t() if delta.turned(site) else weight
        changed = rows.flatten().index_add(0, index, values.to(weight.dtype)).view(delta.sizes(site))
        return changed.t() if delta.turned(site) else changed
