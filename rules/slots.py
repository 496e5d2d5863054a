"""Slots for low-rank changes: what LoRA and its kin become in an exported graph that many adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rules._layouts import Layout, Part, layout_of
from surgery import LiveSite, LowRank, Rule, Site, SiteError, rule

__all__ = ["LowRankSlotRule", "low_rank_slot", "low_rank_tensors"]


@rule("low-rank-slot")
class LowRankSlotRule(Rule):
    """y = gain ⊙ (W x + B A x) + b + B_bias, with factors of any rank: with none it is the base.

    >>> import torch
    >>> from torch import nn
    >>> from rules.slots import LowRankSlotRule
    >>> from surgery import apply_rules
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 3)), [LowRankSlotRule("0", rank=2, gain=True)], adapter="slot")
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.slot.named_parameters()}
    {'A': (2, 4), 'B': (3, 2), 'gain': (3,)}

    Made by `export_onnx` for LoRA and rules that are folded into the same form; A and B lie as LoraRule's do, with its
    scale in B. `gain`: one number an output feature (DoRA); `bias`: one on B. dtypes are LoraRule's.
    """

    rank: int = 2
    gain: bool = False
    bias: bool = False
    identity = True
    slot_kind = "lora"

    def check(self, module: nn.Module, path: str) -> str | None:
        layout = layout_of(module, self.rank)
        return layout if isinstance(layout, str) else None

    def rewrite(self, site: Site) -> Tensor | None:
        layout = _layout(site.module, self.rank)
        for part in layout.parts:
            A, B = site.param(part.prefix + "A", part.A), site.param(part.prefix + "B", part.B)
            gain = site.param(part.prefix + "gain", (part.out,), 1.0) if self.gain else None
            if not layout.weight_space:
                return site.output + self._branch(site, layout, A, B, gain)
            weight = site.tensor(part.weight)
            changed = weight.to(A.dtype) + part.delta(A, B)
            changed = changed if gain is None else changed * gain.view(part.against_weight)
            site.replace(weight, changed.to(weight.dtype))
        return None

    def _branch(self, site: Site, layout: Layout, A: Tensor, B: Tensor, gain: Tensor | None) -> Tensor:
        bias = site.param("B_bias", (layout.parts[0].out,)) if self.bias else None
        branch = layout.up(layout.down(site, layout.cast(site.input, A), A), B, bias)
        if gain is None:
            return branch * 1.0  # the form that has a faster one
        gain = layout.on_output(gain)
        return (gain - 1) * layout.without_bias(site) + gain * branch

    def free(self, tensor: str) -> tuple[int, str] | None:
        prefix, name = tensor[:-1], tensor[-1]
        return ({"A": 0, "B": 1}[name], f"{prefix}rank") if name in "AB" and prefix in ("", *_PARTS) else None

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        from rules.lora import LoraRule

        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith("A"))
        if any(bool((tensor != 1).any()) for name, tensor in tensors.items() if name.endswith("gain")):
            return self.replace(rank=rank), tensors
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("gain")}
        return LoraRule(rank=rank, alpha=rank, lora_bias=self.bias), kept


_PARTS = ("q_", "k_", "v_", "out_")


def low_rank_slot(rules: Sequence[Rule], module: nn.Module, path: str) -> Rule | None:
    """The slot that holds any of these rules at a module. Where its groups divide all their ranks, it is a branch."""
    groups = getattr(module, "groups", 1)
    ranks = [_rank(one, path) for one in rules]
    rank = 2 * groups if all(one % groups == 0 for one in ranks) else groups + 1
    gain = any(getattr(one, "dora", False) for one in rules)
    bias = any(getattr(one, "lora_bias", False) for one in rules)
    made = LowRankSlotRule(rank=rank, gain=gain, bias=bias)
    return made if made.check(module, path) is None else None


def _rank(one: Any, path: str) -> int:
    return one.room_at(path) if hasattr(one, "room_at") else getattr(one, "rank", 1)


def low_rank_tensors(
    slot: Rule, site: LiveSite, changes: Mapping[str, Any], started: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """A and B, and a gain, for a slot from changes of the module's weights, as `merged` gives them.

    `started`: what the rule's start changed in them (PiSSA), which belongs to the adapter where the base is the file's.
    """
    assert isinstance(slot, LowRankSlotRule)
    found: dict[str, Tensor] = {}
    for part in _layout(site.module, slot.rank).parts:
        change = changes[part.weight]
        assert isinstance(change, LowRank)
        factors = [change, *([started[part.weight]] if started and part.weight in started else [])]
        if not all(isinstance(one, LowRank) for one in factors):
            raise SiteError("what the adapter changed at its start was kept as a copy", where=site.path)
        A = torch.cat([_factors(part, one)[0] for one in factors])
        B = torch.cat([_factors(part, one)[1].to(A.dtype) for one in factors], dim=1)
        found[part.prefix + "A"], found[part.prefix + "B"] = _laid(part, A, B, change.groups)
        if slot.gain:
            gain = change.gain
            ones = torch.ones(part.out, dtype=A.dtype, device=A.device)
            found[part.prefix + "gain"] = ones if gain is None else gain.reshape(-1).to(A.dtype)
    if slot.bias:
        found["B_bias"] = torch.zeros(len(found["B"]), dtype=found["B"].dtype, device=found["B"].device)
    return found


def _factors(part: Part, change: LowRank) -> tuple[Tensor, Tensor]:
    """A and B, with the scale in B."""
    if part.turned:
        return change.B.t(), (change.A * _each(change.scale)).t()
    return change.A, change.B * change.scale


def _each(scale: Any) -> Any:
    return scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale


def _laid(part: Part, A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Flat factors in the shapes of the slot's; a slot without groups gets those of a grouped map side by side."""
    if groups > part.groups:
        out, own = B.shape[0] // groups, B.shape[1]
        wide = B.new_zeros(B.shape[0], own * groups)
        for i in range(groups):
            wide[i * out : (i + 1) * out, i * own : (i + 1) * own] = B[i * out : (i + 1) * out]
        B = wide
    return A.reshape(-1, *part.A[1:]).contiguous(), B.reshape(part.out, -1, *part.B[2:]).contiguous()


def _layout(module: nn.Module, rank: int) -> Layout:
    found = layout_of(module, rank)
    assert isinstance(found, Layout), found
    return found
