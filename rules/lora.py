"""LoRA: a trained low-rank change of a linear map, whatever module holds the map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from rules import _complex, _fields, _init, _lora_combined, _swapped
from rules._layouts import Layout, Part, column_norm, gain_of, layout_of
from rules._low_rank import LowRankRule, sure
from rules.bias import EVERYWHERE, BiasesOf, BiasRule
from rules.slots import low_rank_slot, low_rank_tensors
from surgery import Combination, LiveSite, LowRank, Rule, Share, Site, rule


@rule("lora")
class LoraRule(LowRankRule):
    """y = W x + (alpha / rank) · B A x, with A and B trained and W kept.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from rules import LoraRule
    >>> model = nn.ModuleDict({"query": nn.Linear(32, 32), "value": nn.Linear(32, 32)})
    >>> _ = apply_rules(model, [LoraRule(targets=["query", "value"], rank=8, alpha=16)])
    >>> tuple(model["query"].adapters.default.A.shape), tuple(model["query"].adapters.default.B.shape)
    ((8, 32), (32, 8))

    Goes on Linear, Embedding, Conv1d/2d/3d, transformers' Conv1D and MultiheadAttention (its q, k, v and output
    maps), on their subclasses, and on quantised Linears. The shapes of A and B are PEFT's: (rank, in) and
    (out, rank); a convolution's are (rank, in/groups, *kernel) and (out, rank/groups, 1, …) (with groups, PEFT's A
    looks at all channels and can't be merged; ours can). They are on the
    module's device, in `dtype`, else the module's, else float32 where that is half precision or packed.

    Fields, with PEFT's names: `rank` (r), `alpha` (lora_alpha); `dropout` (lora_dropout, on the branch's input;
    an Embedding's indices take none); `bias` "none", "all" (every bias of the model is trained) or "lora_only"
    (the targets'); `lora_bias` (a bias on B); `rslora` (use_rslora: alpha / sqrt(rank)); `dora` (use_dora);
    `init` (init_lora_weights): "kaiming" (True), "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "mica"
    (B holds the weight's least directions and is not trained), or "random" (False: B is not zero);
    `rank_pattern`, `alpha_pattern`: path suffix or regular expression → value; `max_rank`: A and B have room for
    this rank, zero beyond the rule's own, for `hotswap` to use.
    Defaults are PEFT's. PiSSA and OLoRA change the base's weight at the start; `remove` gives its bits back.

    Raises `RuleError` for a value out of range; a module that can't take the rule is a problem of the plan.
    Sources: Hu et al. 2021, arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353; PEFT's LoraConfig.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rslora: bool = False
    dora: bool = False
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "mica", "random"] | str = "kaiming"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    max_rank: int | None = None
    dtype: Any = None

    def validate(self) -> None:
        _fields.patterns(self, "rank_pattern", "alpha_pattern")
        ranks, alphas = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        if not all(type(value) is int and value >= 1 for value in (self.rank, *ranks.values())):
            raise self.bad("rank_pattern" if ranks else "rank", "a whole number from 1")
        if self.max_rank is not None and (
            type(self.max_rank) is not int or self.max_rank < max(self.rank, *ranks.values(), 1)
        ):
            raise self.bad("max_rank", "a whole number from the rule's ranks up, or None")
        if not all(type(value) in (int, float) and 0 < value < math.inf for value in (self.alpha, *alphas.values())):
            raise self.bad("alpha_pattern" if alphas else "alpha", "a number above 0")
        _fields.chance(self, "dropout")
        _fields.one_of(self, "bias", "none", "all", "lora_only")
        _fields.flag(self, "lora_bias", "rslora", "dora")
        if not _init.known(self.init):
            raise self.bad("init", f"one of {', '.join(_init.NAMES)} (PEFT's True is 'kaiming', its False 'random')")
        if self.dtype not in (None, "float16", "bfloat16", "float32", "float64"):
            raise self.bad("dtype", "a floating-point dtype")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init in ("kaiming", "gaussian", "mica")

    @property
    def additive(self) -> bool:
        return not self.dora

    def matrices(self, module: nn.Module, path: str) -> Mapping[str, tuple[int, int]] | None:
        """An attention's maps; of a convolution in groups that divide the rank, all groups together."""
        if not isinstance(module, nn.MultiheadAttention) and getattr(module, "groups", 1) == 1:
            return None
        layout = sure(layout_of(module, self.rank_at(path)))
        return {f"{path}.{part.weight}".strip("."): part.matrix for part in layout.parts}

    def alike(self, path: str) -> tuple[int, float]:
        return self.rank_at(path), self.alpha_at(path)

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := _complex.why_not(self, module):
            return why
        used = layout_of(module, self.rank_at(path))
        layout = used if self.max_rank is None else layout_of(module, self.max_rank)
        if isinstance(layout, str) or isinstance(used, str):
            return str(layout)
        if used.parts[0].groups != layout.parts[0].groups:
            return f"its groups divide one of rank {self.rank_at(path)} and max_rank {self.max_rank}, and not the other"
        if self.dropout and layout.weight_space and layout.kind != "embedding":  # whose indices take none
            return f"dropout={self.dropout} has no input to act on: {layout.why}; give it a rule with dropout=0"
        if self.lora_bias and not layout.takes_bias(module):
            return "lora_bias needs a map with an output bias of its own"
        if self.dora and layout.packed:
            return "DoRA needs the weight's norm, and the weight is packed"
        return _init.why_not(
            self.init, used, any(p is not None and p.is_complex() for p in module._parameters.values())
        )

    def review(self, paths: Sequence[str]) -> Iterable[str]:
        return _fields.idle(self, paths, "rank_pattern", "alpha_pattern")

    def companions(self) -> Iterable[Rule]:
        if self.bias == "all":
            yield BiasRule(targets=EVERYWHERE)
        elif self.bias == "lora_only":
            yield BiasesOf(targets=self.targets, exclude=self.exclude, layers=self.layers)

    def rewrite(self, site: Site) -> Tensor | None:
        layout, scale = self.layout(site), self.scale_at(site.path)
        starts = [_init.fill(self.init, which, layout) for which in "AB"]
        for part, used in zip(layout.parts, self.used_layout(site).parts, strict=True):
            fills = [_swapped.filled(start, which, used, part) for start, which in zip(starts, "AB", strict=True)]
            A = site.param(part.prefix + "A", part.A, fills[0], dtype=self.dtype)
            B = site.param(
                part.prefix + "B", part.B, fills[1], dtype=self.dtype, trainable=_init.trains(self.init, "B")
            )
            gain = None
            if self.dora:
                magnitude = site.param(part.prefix + "magnitude", part.magnitude, dtype=self.dtype)
                gain = gain_of(part, magnitude, site.tensor(part.weight).to(A.dtype) + part.delta(A, B) * scale)
            if not layout.weight_space:
                return site.output + self._branch(site, layout, A, B, gain, scale)
            weight = site.tensor(part.weight)
            changed = weight.to(A.dtype) + part.delta(A, B) * scale
            changed = changed if gain is None else changed * gain
            site.replace(weight, changed.to(weight.dtype))
            if self.lora_bias:
                self._bias(site, layout, gain, scale)
        return None

    def _bias(self, site: Site, layout: Layout, gain: Tensor | None, scale: float) -> Tensor | None:
        """The bias on B, or None where it was added to the module's own: what is around its map is around that."""
        added = site.param("B_bias", (layout.parts[0].out,), dtype=self.dtype)
        if layout.plain:
            return added
        added = added * scale if gain is None else added * scale * gain.view(-1)
        site.replace(site.bias, (site.bias + added).to(site.bias.dtype))
        return None

    def _branch(self, site: Site, layout: Layout, A: Tensor, B: Tensor, gain: Tensor | None, scale: float) -> Tensor:
        bias = self._bias(site, layout, gain, scale) if self.lora_bias else None
        x = layout.cast(site.input, A)
        dropping = self.dropout > 0 and layout.kind != "embedding"
        if dropping:
            x = F.dropout(x, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        branch = layout.up(layout.down(site, x, A), B, bias) * scale
        if gain is None:
            return branch
        gain = layout.on_output(gain)
        base = layout.base(site, x) if dropping else layout.without_bias(site)
        return (gain - 1) * base + gain * branch

    def initialise(self, site: LiveSite) -> Mapping[str, LowRank] | None:
        if not (self.dora or _init.together(self.init)):
            return None
        scale, changes = self.scale_at(site.path), {}
        for part in self.layout(site).parts:
            A, B = site.params[part.prefix + "A"], site.params[part.prefix + "B"]
            weight, rank = site.tensor(part.weight), self.rank_at(site.path)
            if _init.fill_jointly(self.init, part, weight, A[:rank], B[:, :rank], scale):
                changes[part.weight] = change = part.low_rank(A, B, -scale)
                weight = weight + change.delta(part.shape).to(weight.device)
            if self.dora:
                norm = column_norm(part, weight.to(A.dtype) + part.delta(A, B) * scale)
                site.params[part.prefix + "magnitude"].copy_(norm)
        return changes

    def merged(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        changes = self._changes(site)
        if self.lora_bias:
            bias, added = site.bias, site.params["B_bias"].detach() * self.scale_at(site.path)
            if self.dora:
                added = added * self._gain(site, self.layout(site).parts[0]).view(-1)
            changes["bias"] = (bias + added).to(bias.dtype)
        return changes

    def _changes(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        """Of the weights."""
        scale, changes = self.scale_at(site.path), dict[str, LowRank | Tensor]()
        for part in self.layout(site).parts:
            A, B = (site.params[part.prefix + name].detach() for name in "AB")
            changes[part.weight] = part.low_rank(A, B, scale)
            if self.dora:
                changes[part.weight] = self._rescaled(site, part, A, B, scale)
        return changes

    def _rescaled(self, site: LiveSite, part: Part, A: Tensor, B: Tensor, scale: float) -> LowRank | Tensor:
        in_weight = self.layout(site).weight_space
        base = self._starting(site, part, A)
        changed = base + part.delta(A, B) * scale
        gain = self._gain(site, part)
        if in_weight or not site.folded(part.weight):
            return part.low_rank(A, B, scale, gain)
        weight = site.tensor(part.weight)  # a branch rescales the base alone, not what other branches added
        return (weight + (gain * changed - base)).to(weight.dtype)

    def _starting(self, site: LiveSite, part: Part, A: Tensor) -> Tensor:
        """The weight that DoRA rescales."""
        in_weight = self.layout(site).weight_space
        return (site.tensor(part.weight) if in_weight else site.base(part.weight)).detach().to(A.dtype)

    def _gain(self, site: LiveSite, part: Part) -> Tensor:
        A, B, magnitude = (site.params[part.prefix + name].detach() for name in ("A", "B", "magnitude"))
        changed = self._starting(site, part, A) + part.delta(A, B) * self.scale_at(site.path)
        return gain_of(part, magnitude, changed)

    def swapped(self, live: Rule, site: LiveSite) -> dict[str, Tensor]:
        return _swapped.tensors(self, live, site)

    def neutral(self, site: LiveSite) -> dict[str, Tensor]:
        zeros = {name: tensor.zero_() for name, tensor in site.params.items() if not name.endswith("magnitude")}
        return _swapped.completed(self, site, zeros)

    slot_kind = "lora"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> Rule | None:
        return low_rank_slot(rules, module, path)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        bias = site.params["B_bias"] * self.scale_at(site.path) if self.lora_bias else None
        return low_rank_tensors(slot, site, self._changes(site), bias)

    def padded(self, rank: int) -> LoraRule:
        return self.replace(max_rank=rank)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        return _lora_combined.combined(shares, how)

    def united(self, rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
        return _lora_combined.united(cast("Mapping[str, LowRankRule]", rules))

    def alone(self) -> Rule:
        return self.replace(bias="none")
