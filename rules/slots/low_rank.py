"""The slot for low-rank changes: LoRA and similar rules in an exported graph that many adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Rule, Site, SiteError, SlotRule, rule
from surgery.rules._linear.layouts import Layout, WeightPart, layout_of
from surgery.rules._shared import complex_weights

__all__ = ["LowRankSlotRule", "LowRankSlottable", "low_rank_slot", "low_rank_tensors"]


@rule("low-rank-slot")
class LowRankSlotRule(SlotRule):
    """y = gain ⊙ (W x + B A x + B_bias) + b, with factors of any rank. With rank 0 and a gain of ones it is the base.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.rules.slots.low_rank import LowRankSlotRule
    >>> from surgery import apply_rules
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 3)), [LowRankSlotRule("0", rank=2, gain=True)], adapter="slot")
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.slot.named_parameters()}
    {'A': (2, 4), 'B': (3, 2), 'gain': (3,)}

    `export_onnx` inserts it for LoRA and rules with the same form. A and B have the layout of LoraRule's, with its
    scale in B. `gain`: one number per output feature (DoRA); `bias`: a bias on B; `dtype`: as LoraRule's. `rank` is the
    rank in the export. Later only this counts: whether the groups of a convolution divide it.
    """

    rank: int = 2
    gain: bool = False
    bias: bool = False
    dtype: Any = None
    identity = True
    slot_kind = "lora"

    def alike(self, path: str) -> tuple[()]:
        return ()

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = layout_of(module, self.rank)
        if isinstance(layout, str):
            return layout
        return None if not self.bias or layout.takes_bias(module) else "it has no bias to add one to"

    def rewrite(self, site: Site) -> Tensor | None:
        layout = _layout(site.module, self.rank)
        for part in layout.parts:
            A = site.param(part.prefix + "A", part.A, dtype=self.dtype)
            B = site.param(part.prefix + "B", part.B, dtype=self.dtype)
            gain = site.param(part.prefix + "gain", (part.out,), 1.0, dtype=self.dtype) if self.gain else None
            if not layout.weight_space:
                return site.output + self._branch(site, layout, A, B, gain)
            weight = site.tensor(part.weight)
            changed = weight.to(A.dtype) + part.delta(A, B)
            changed = changed if gain is None else changed * gain.view(part.against_weight)
            site.replace(weight, changed.to(weight.dtype))
            if self.bias:
                self._bias(site, layout, gain)
        return None

    def _bias(self, site: Site, layout: Layout, gain: Tensor | None) -> Tensor | None:
        added = site.param("B_bias", (layout.parts[0].out,), dtype=self.dtype)
        if layout.plain:
            return added
        added = added if gain is None else added * gain
        site.replace(site.bias, (site.bias + added).to(site.bias.dtype))
        return None

    def _branch(self, site: Site, layout: Layout, A: Tensor, B: Tensor, gain: Tensor | None) -> Tensor:
        bias = self._bias(site, layout, gain) if self.bias else None
        branch = layout.up(layout.down(site, layout.cast(site.input, A), A), B, bias)
        if gain is None:
            return branch * 1.0  # the form that `lowering` replaces by a faster one
        gain = layout.on_output(gain)
        return (gain - 1) * layout.without_bias(site) + gain * branch

    def free(self, tensor: str) -> tuple[int, str] | None:
        prefix, name = tensor[:-1], tensor[-1]
        if name not in "AB" or prefix not in ("", *_PARTS):
            return None
        # Where a convolution has groups, B holds one group's share of the rank. Without groups `rank` is 2.
        word = "rank" if name == "A" or self.rank == 2 else "rank_of_a_group"
        return {"A": 0, "B": 1}[name], f"{prefix}{word}"

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith("A"))
        if any(bool((tensor != 1).any()) for name, tensor in tensors.items() if name.endswith("gain")):
            return self.replace(rank=rank), tensors
        without_gain = {name: tensor for name, tensor in tensors.items() if not name.endswith("gain")}
        lora = {"rule": "lora", "rank": rank, "alpha": rank, "lora_bias": self.bias, "dtype": self.dtype}
        return Rule.from_dict(lora), without_gain


class LowRankSlottable(Rule):
    """The base of rules whose change of a map is a product of two factors, so that LoRA's slots hold it."""

    slot_kind = "lora"

    def changes(self, site: LiveSite) -> Mapping[str, Any]:
        """Returns the change of each weight as a `LowRank`. Default: that of `merged`."""
        return self.merged(site)

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        return low_rank_slot(rules, module, path)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return low_rank_tensors(slot, site, self.changes(site))


_PARTS = ("q_", "k_", "v_", "out_")


def low_rank_slot(rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
    """Returns the slot that holds any of these rules at a module. It is a branch if the groups divide all ranks."""
    groups = getattr(module, "groups", 1)
    ranks = [_rank(rule, path) for rule in rules]
    rank = 2 * groups if all(rank_there % groups == 0 for rank_there in ranks) else groups + 1
    gain = any(getattr(rule, "dora", False) for rule in rules)
    bias = any(getattr(rule, "lora_bias", False) for rule in rules)
    dtypes = {getattr(rule, "dtype", None) for rule in rules}
    slot = LowRankSlotRule(rank=rank, gain=gain, bias=bias, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    return slot if slot.check(module, path) is None else None


def _rank(rule: Any, path: str) -> int:
    return rule.room_at(path) if hasattr(rule, "room_at") else getattr(rule, "rank", 1)


def low_rank_tensors(
    slot: Rule, site: LiveSite, changes: Mapping[str, Any], bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Converts changes of a module's weights (`merged`) to a slot's A, B and gain. `bias`: a bias on B.

    A change of the weights by the rule's initialisation (PiSSA) becomes part of the adapter: the file has the base's
    weights.
    """
    assert isinstance(slot, LowRankSlotRule)
    dtype = getattr(torch, slot.dtype) if slot.dtype else site.dtype
    results: dict[str, Tensor] = {}
    for part in _layout(site.module, slot.rank).parts:
        change = changes[part.weight]
        factors = [change, *([site.changed[part.weight]] if part.weight in site.changed else [])]
        if not all(isinstance(factor, LowRank) and factor.groups == change.groups for factor in factors):
            raise SiteError("what the adapter changed at its start can't be said in its groups", where=site.path)
        if change.groups < part.groups:
            why = f"in the file each rank belongs to one of the {part.groups} groups of the convolution"
            raise _slot_lacks(site, f"a rank of {len(change.A)} that its groups don't divide", why)
        if change.gain is not None and not slot.gain:
            raise _slot_lacks(site, "a gain (DoRA)", "no adapter had one when the file was exported")
        pairs = [_factors(part, factor) for factor in factors]
        A = torch.cat([A.unflatten(0, (change.groups, -1)) for A, _ in pairs], dim=1).flatten(0, 1)
        B = torch.cat([B.to(A.dtype) for _, B in pairs], dim=1)
        results[part.prefix + "A"], results[part.prefix + "B"] = _to_slot_shapes(part, A, B, change.groups)
        if slot.gain:
            ones = torch.ones(part.out, dtype=A.dtype, device=A.device)
            results[part.prefix + "gain"] = ones if change.gain is None else change.gain.reshape(-1)
    if bias is not None and not slot.bias:
        raise _slot_lacks(site, "a bias on B", "no adapter had one when the file was exported")
    if slot.bias:
        results["B_bias"] = results["B"].new_zeros(len(results["B"])) if bias is None else bias
    return {name: tensor.detach().to(dtype) for name, tensor in results.items()}


def _slot_lacks(site: LiveSite, what: str, why: str) -> SiteError:
    fix = "export the model again with this adapter on it"
    return SiteError(f"the adapter has {what}, and its slot has none", where=site.path, why=why, fix=fix)


def _factors(part: WeightPart, change: LowRank) -> tuple[Tensor, Tensor]:
    """Returns A and B, with the scale in B."""
    if part.turned:
        return change.B.t(), (change.A * _each(change.scale)).t()
    return change.A, change.B * change.scale


def _each(scale: Any) -> Any:
    return scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale


def _to_slot_shapes(part: WeightPart, A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Reshapes flat factors for the slot. A slot without groups gets the factors of all groups side by side."""
    if groups > part.groups:
        out, own = B.shape[0] // groups, B.shape[1]
        wide = B.new_zeros(B.shape[0], own * groups)
        for i in range(groups):
            wide[i * out : (i + 1) * out, i * own : (i + 1) * own] = B[i * out : (i + 1) * out]
        B = wide
    return A.reshape(-1, *part.A[1:]).contiguous(), B.reshape(part.out, -1, *part.B[2:]).contiguous()


def _layout(module: nn.Module, rank: int) -> Layout:
    layout = layout_of(module, rank)
    assert isinstance(layout, Layout), layout
    return layout
