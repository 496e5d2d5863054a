"""AdaLoRA: a low-rank change in the form of singular values and vectors, whose ranks are shared out while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from rules import _combined, _complex, _delta, _fields
from rules.slots import low_rank_slot, low_rank_tensors
from surgery import Combination, LiveSite, LowRank, Rule, Share, Site, rule


@rule("adalora")
class AdaLoraRule(Rule):
    """y = W x + alpha / rank · B diag(E) A x.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from rules import AdaLoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [AdaLoraRule("0", rank=4, total_step=100)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'A': (4, 32), 'E': (4, 1), 'B': (16, 4)}

    Goes on Linear, transformers' Conv1D and quantised Linears (unmerged). A and B start normal with deviation 0.02, E
    at zero: the output is unchanged. `rank` (init_r), `alpha` (lora_alpha), `dropout` (lora_dropout); for
    `RankAllocator`, which sets entries of E to zero while training: `target_r` (the mean rank to come to), `tinit`,
    `tfinal`, `deltaT`, `total_step`, `beta1`, `beta2`; `orth_reg_weight`: of `orthogonal_loss`, to be added to the
    loss (PEFT's model adds it itself). Defaults are PEFT's. The scale is alpha / (rank + 0.00001), as there.

    Raises `RuleError` for values out of range, or a schedule longer than `total_step`.
    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's AdaLoraConfig.
    """

    rank: int = 12
    alpha: float = 8
    dropout: float = 0.0
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    identity = True
    additive = True  # type: ignore[assignment]

    def validate(self) -> None:
        _fields.whole(self, "rank", "target_r", "deltaT")
        _fields.whole(self, "tinit", "tfinal", least=0)
        _fields.numbers(self, "alpha", low=0)
        _fields.numbers(self, "beta1", "beta2", low=0, high=1)
        _fields.numbers(self, "orth_reg_weight", low=-1e-9)
        _fields.chance(self, "dropout")
        if self.total_step is not None:
            _fields.whole(self, "total_step")
            if self.tinit >= self.total_step - self.tfinal:
                raise self.bad("total_step", "more than tinit + tfinal")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def rank_at(self, path: str) -> int:
        return self.rank

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := _complex.why_not(self, module):
            return why
        return _delta.why_no_map(module)

    def rewrite(self, site: Site) -> Tensor:
        out, inner = _delta.sizes(site)
        A = site.param("A", (self.rank, inner), _normal)
        E = site.param("E", (self.rank, 1))
        B = site.param("B", (out, self.rank), _normal)
        x = site.input.to(A.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.output + F.linear(F.linear(x, A * E), B) * self.scale

    def merged(self, site: LiveSite) -> dict[str, LowRank]:
        A, E, B = (site.params[name].detach() for name in "AEB")
        A = A * E
        return {"weight": LowRank(A.t(), B.t(), self.scale) if _delta.turned(site) else LowRank(B, A, self.scale)}

    slot_kind = "lora"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> Rule | None:
        return low_rank_slot(rules, module, path)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return low_rank_tensors(slot, site, self.merged(site))

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, _combined.Tensors]:
        if how.untouched(shares):
            return self, shares[0].params
        if how.method != "cat" and not how.by_matrix:
            raise how.refusal(shares, "sums of its three factors are no sum of their product", "method='cat', or 'svd'")
        rules = [cast(AdaLoraRule, share.rule) for share in shares]
        rank = _combined.rank_of(how, shares, [rule.rank for rule in rules], _combined.largest_rank(how))
        rule = self.replace(rank=rank, alpha=rank, target_r=min(self.target_r, rank))
        ups = [share.params["B"].detach() for share in shares]
        downs = [(share.params["A"] * share.params["E"]).detach() for share in shares]
        up, down = _combined.factors(how, shares, [rule.scale for rule in rules], ups, downs, rank)
        sizes = down.norm(dim=1, keepdim=True)  # E: of rows that are not all zero, their size
        return rule, {"A": down / sizes.masked_fill(sizes == 0, 1.0), "E": sizes / rule.scale, "B": up}


def _normal(tensor: Tensor) -> Tensor:
    return nn.init.normal_(tensor, std=0.02)
