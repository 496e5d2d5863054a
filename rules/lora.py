"""LoRA: a trained low-rank change of a linear map, whatever module holds the map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Rule, Site, SiteError, packed_weight_of, rule
from surgery.rules._linear import initial, loftq
from surgery.rules._linear.forward_maps import why_unreadable
from surgery.rules._linear.layouts import Layout, WeightPart, column_norm, gain_for, gain_of, layout_of
from surgery.rules._linear.packed_norm import changed_norm
from surgery.rules._low_rank import swapping
from surgery.rules._low_rank.method import LowRankMethod
from surgery.rules._low_rank.rule import LowRankRule, TensorSource, sure
from surgery.rules._shared import fields
from surgery.rules.bias import EVERYWHERE, BiasesOf, BiasRule
from surgery.rules.invocation import InvocationRule, within_invocation
from surgery.rules.slots.low_rank import LowRankSlotRule, low_rank_tensors


@rule("lora")
class LoraRule(LowRankMethod):
    """y = W x + (alpha / rank) · B A x: a trained low-rank change of a linear map; W is kept.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import LoraRule
    >>> model = nn.ModuleDict({"query": nn.Linear(32, 32), "value": nn.Linear(32, 32)})
    >>> _ = apply_rules(model, [LoraRule(targets=["query", "value"], rank=8, alpha=16)])
    >>> tuple(model["query"].adapters.default.A.shape), tuple(model["query"].adapters.default.B.shape)
    ((8, 32), (32, 8))

    Works on Linear, Embedding, Conv1d/2d/3d, transformers' Conv1D and MultiheadAttention (its q, k, v and output maps),
    on their subclasses, and on quantised Linears. A is (rank, in) and B is (out, rank), as in PEFT. On a convolution
    they are (rank, in/groups, *kernel) and (out, rank/groups, 1, …). (With groups, PEFT's A reads all channels and
    can't be merged; this A can.) Tensors are made on the module's device.

    Args:
        rank: rows of A, columns of B; default 8. PEFT: r.
        alpha: numerator of the scale; default 8. PEFT: lora_alpha.
        dropout: probability of dropout on the branch's input while training; default 0. An Embedding's indices have no
            dropout. PEFT: lora_dropout.
        bias: which biases are trained too: "none" (default), "all" of the model's, or "lora_only" (the targets').
        lora_bias: whether B has a trained bias; default False.
        rslora: scale by alpha / sqrt(rank); default False. PEFT: use_rslora.
        dora: train the norm of each output feature apart from its direction; default False. PEFT: use_dora.
        init: how A and B start. PEFT: init_lora_weights. "kaiming" (default; PEFT's True), "gaussian", "orthogonal",
            "pissa", "pissa_niter_N", "olora", "mica" (B holds the weight's least directions and is not trained), or
            "random" (PEFT's False: B is not zero). "pissa" and "olora" change the base's weight at the start; `remove`
            restores its bits. On a quantised weight the rest is quantised anew. "loftq" takes a quantised weight's
            error in (see `loftq_base`).
        loftq_base: for init="loftq": a folder with the safetensors files of the weights before they were quantised, as
            `save_pretrained` writes them. Default None.
        loftq_steps: for init="loftq": 1 (default) keeps the codes; B A approximates what quantising lost. Each further
            step quantises W - scale · B A anew and approximates the rest, while the error falls. `remove` restores the
            codes. PEFT: loftq_config's loftq_iter.
        rank_pattern: path suffix or regular expression → rank there; default None.
        alpha_pattern: path suffix or regular expression → alpha there; default None.
        invocation: token ids. The adapter acts on a text's tokens from the last such sequence on, the sequence included
            (aLoRA); rows without it have the base's bits. For Linear and Conv1D; default None: on all tokens. PEFT:
            alora_invocation_tokens.
        tied: sites that share their weight share A and B, such as an embedding and its head. Both have the tensors of
            an Embedding, and the same ΔW. For Embedding and Linear; default False. PEFT: ensure_weight_tying.
        max_rank: A and B have room for this rank, filled with zeros beyond the rule's own, for a later `hotswap`;
            default None, no extra room.
        dtype: dtype of the tensors. Default None: the module's dtype, or float32 if that is half precision or packed.

    Raises:
        RuleError: a field is out of range. A module that can't take the rule is a problem of the plan.

    Sources: Hu et al. 2021, arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353; aLoRA arXiv:2504.12397;
    PEFT's LoraConfig, whose defaults these are.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rslora: bool = False
    dora: bool = False
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "mica", "random", "loftq"] | str = "kaiming"
    loftq_base: str | None = None
    loftq_steps: int = 1
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    invocation: Sequence[int] | None = None
    tied: bool = False
    max_rank: int | None = None
    dtype: torch.dtype | str | None = None

    def validate(self) -> None:
        super().validate()
        fields.one_of(self, "bias", "none", "all", "lora_only")
        fields.flag(self, "lora_bias", "rslora", "dora", "tied")
        if not initial.is_known(self.init):
            raise self.bad("init", f"one of {', '.join(initial.NAMES)} (PEFT's True is 'kaiming', its False 'random')")
        if self.tied and (self.dora or self.invocation is not None or initial.needs_weight(self.init)):
            raise self.bad("tied", "False beside dora, an invocation or a start from the weight")
        fields.whole(self, "loftq_steps")
        if (self.init == "loftq") != (self.loftq_base is not None):
            raise self.bad("loftq_base", 'a folder of weights with init="loftq", and None with another init')
        tokens = self.invocation
        if tokens is not None and (not tokens or not all(type(token) is int and token >= 0 for token in tokens)):
            raise self.bad("invocation", "a list of token ids, or None")
        if tokens is not None and self.dora:
            raise self.bad("dora", "False beside invocation: it rescales the weight for all tokens")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init in ("kaiming", "gaussian", "mica")

    @property
    def additive(self) -> bool:
        return not self.dora

    def alike(self, path: str) -> tuple[int, float] | None:
        # Tied factors depend on which weight a module has
        return None if self.tied else (self.rank_at(path), self.alpha_at(path))

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := super().check(module, path):
            return why
        layout, used = (sure(layout_of(module, rank)) for rank in (self.room_at(path), self.rank_at(path)))
        if self.lora_bias and not layout.takes_bias(module):
            return "lora_bias needs a map with an output bias of its own"
        if self.invocation is not None and (layout.weight_space or layout.kind not in ("linear", "conv1d")):
            return "an invocation needs a map of each token: a Linear or transformers' Conv1D"
        if self.tied and (layout.weight_space or layout.packed or layout.kind not in ("linear", "embedding")):
            return "tied factors are for an Embedding or a Linear whose forward is the map"
        if self.dora and (why := why_unreadable(module, "DoRA needs the weight's norm")):
            return why
        if self.loftq_base is not None:
            return self._why_no_loftq(module, path, used)
        if initial.needs_weight(self.init) and (why := why_unreadable(module, f"init={self.init!r} reads the weight")):
            return why
        return initial.why_not(
            self.init, used, any(p is not None and p.is_complex() for p in module._parameters.values())
        )

    def _why_no_loftq(self, module: nn.Module, path: str, layout: Layout) -> str | None:
        assert self.loftq_base is not None
        if (packed := packed_weight_of(module)) is None:
            return "init='loftq' takes the error of quantising in, and it has no quantised weight of a known layout"
        if layout.parts[0].A[0] > min(packed.shape):
            return f"init='loftq' takes {layout.parts[0].A[0]} directions of a weight that has {min(packed.shape)}"
        return loftq.why_not(self.loftq_base, path, packed.shape)

    def companions(self) -> Iterable[Rule]:
        if self.invocation is not None:
            yield InvocationRule(tokens=self.invocation)
        if self.bias == "all":
            yield BiasRule(targets=EVERYWHERE)
        elif self.bias == "lora_only":
            yield BiasesOf(targets=self.targets, exclude=self.exclude, layers=self.layers)

    def factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        if self.tied:
            return self._tied_factors(part, tensor)
        A = tensor("A", part.A, initial.fill(self.init, "A", part))
        return A, tensor("B", part.B, initial.fill(self.init, "B", part), trainable=initial.trains(self.init, "B"))

    def _tied_factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        """The factors of an Embedding; those of a Linear are their transposes, so that ΔW is the same matrix."""
        (down, up) = (part.A, part.B) if part.looked_up else (part.B[::-1], part.A[::-1])
        A = tensor("A", down, initial.fill(self.init, "A", replace(part, looked_up=True)))
        B = tensor("B", up, initial.fill_transposed(self.init))
        return (A, B) if part.looked_up else (B.t(), A.t())

    def tensors_for(self, part: WeightPart, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"A": B.t(), "B": A.t()} if self.tied and not part.looked_up else {"A": A, "B": B}

    def gain(self, site: Site, part: WeightPart, A: Tensor, B: Tensor) -> Tensor | None:
        if not self.dora:
            return None
        magnitude = site.param(part.prefix + "magnitude", part.magnitude, dtype=self.dtype)
        if self.layout(site).packed:
            return gain_for(part, magnitude, site.apply(changed_norm, site.weight, A, B, self.scale_at(site.path)))
        weight = site.tensor(part.weight).to(A.dtype)
        return gain_of(part, magnitude, weight + part.delta(A, B) * self.scale_at(site.path))

    def branch(self, site: Site, layout: Layout, A: Tensor, B: Tensor, gain: Tensor | None, scale: float) -> Tensor:
        branch = super().branch(site, layout, A, B, gain, scale)
        return branch if self.invocation is None else site.apply(within_invocation, branch, site.this, site.adapter)

    def added_bias(self, site: Site, layout: Layout, gain: Tensor | None) -> Tensor | None:
        if not self.lora_bias:
            return None
        added = site.param("B_bias", (layout.parts[0].out,), dtype=self.dtype)
        if layout.plain:
            return added
        scale = self.scale_at(site.path)
        added = added * scale if gain is None else added * scale * gain.view(-1)
        site.replace(site.bias, (site.bias + added).to(site.bias.dtype))  # what is around its map is around that
        return None

    def initialise(self, site: LiveSite) -> Mapping[str, LowRank | Tensor] | None:
        if not (self.dora or initial.needs_weight(self.init)):
            return None
        scale, changes = self.scale_at(site.path), dict[str, LowRank | Tensor]()
        for part in self.layout(site).parts:
            A, B = site.params[part.prefix + "A"], site.params[part.prefix + "B"]
            weight, rank = site.tensor(part.weight), self.rank_at(site.path)
            if weight.is_meta and initial.needs_weight(self.init):
                why = f"init={self.init!r} decomposes the base's weight, which is on the meta device"
                fix = "load the base's weights first, or use another init, such as 'kaiming'"
                raise SiteError(f"{self.label} can't start here", where=site.path, why=why, fix=fix)
            if self.loftq_base is not None:
                original, packed = loftq.original_weight(self.loftq_base, site.path), packed_weight_of(site.module)
                assert packed is not None
                wanted = loftq.fill(packed, original, A[:rank], B[:, :rank], scale, self.loftq_steps)
                if wanted is not None:
                    changes[part.weight], weight = wanted, packed.rounded(wanted)
            elif initial.fill_jointly(self.init, part, weight, A[:rank], B[:, :rank], scale):
                changes[part.weight] = change = part.low_rank(A, B, -scale)
                weight = weight + change.delta(part.shape).to(weight.device)
            if self.dora:
                norm = column_norm(part, weight.to(A.dtype) + part.delta(A, B) * scale)
                site.params[part.prefix + "magnitude"].copy_(norm)
        return changes

    @property
    def mergeable(self) -> bool:
        return self.invocation is None

    @property
    def why_not_merged(self) -> str:  # type: ignore[override]
        return "with an invocation, which tokens it acts on depends on the text"

    @property
    def slot_kind(self) -> str | None:  # type: ignore[override]
        return "lora" if self.invocation is None else None

    def merged(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        changes = self.changes(site)
        if self.lora_bias:
            bias, added = site.bias, site.params["B_bias"].detach() * self.scale_at(site.path)
            if self.dora:
                added = added * self._gain(site, self.layout(site).parts[0]).view(-1)
            changes["bias"] = bias + added
        return changes

    def changes(self, site: LiveSite) -> dict[str, LowRank | Tensor]:
        if not self.dora:
            return super().changes(site)
        parts = self.layout(site).parts
        return {part.weight: self._rescaled(site, part, *self.factors_of(site.params, part)) for part in parts}

    def _rescaled(self, site: LiveSite, part: WeightPart, A: Tensor, B: Tensor) -> LowRank | Tensor:
        in_weight, scale = self.layout(site).weight_space, self.scale_at(site.path)
        base = self._starting(site, part, A)
        changed = base + part.delta(A, B) * scale
        gain = self._gain(site, part)
        if in_weight or not site.folded(part.weight):
            return part.low_rank(A, B, scale, gain)
        weight = site.tensor(part.weight)  # a branch rescales the base alone, not what other branches added
        return weight + (gain * changed - base)

    def _starting(self, site: LiveSite, part: WeightPart, A: Tensor) -> Tensor:
        """The weight that DoRA rescales."""
        in_weight = self.layout(site).weight_space
        return (site.tensor(part.weight) if in_weight else site.base(part.weight)).detach().to(A.dtype)

    def _gain(self, site: LiveSite, part: WeightPart) -> Tensor:
        A, B, magnitude = (site.params[part.prefix + name].detach() for name in ("A", "B", "magnitude"))
        changed = self._starting(site, part, A) + part.delta(A, B) * self.scale_at(site.path)
        return gain_of(part, magnitude, changed)

    def weights_at(self, module: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
        """Returns the weights that LoRA can change on a module: name → (shape, groups); empty if there are none."""
        groups = getattr(module, "groups", 1)
        layout = layout_of(module, groups if isinstance(groups, int) else 1)
        return {part.weight: (part.shape, part.groups) for part in layout.parts} if isinstance(layout, Layout) else {}

    def tensors_of(
        self, site: LiveSite, changes: Mapping[str, LowRank], bias: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of a rule with the scale 1 that makes these changes of weights, in the module's dtype."""
        slot = LowRankSlotRule(rank=self.rank_at(site.path), bias=self.lora_bias, dtype=self.dtype)
        return low_rank_tensors(slot, site, changes, bias)

    def neutral(self, site: LiveSite) -> dict[str, Tensor]:
        zeros = {name: tensor.zero_() for name, tensor in site.params.items() if not name.endswith("magnitude")}
        return swapping.complete(self, site, zeros)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        bias = site.params["B_bias"] * self.scale_at(site.path) if self.lora_bias else None
        return low_rank_tensors(slot, site, self.changes(site), bias)

    def resized(self, rank: int, **changes: Any) -> LowRankRule:
        return super().resized(rank, init="kaiming" if initial.needs_weight(self.init) else self.init, **changes)

    def alone(self) -> Rule:
        return self.replace(bias="none")
