"""Bottleneck adapters: a small network after a module, or parallel to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SiteError, SlotRule, rule
from surgery.rules._shared import combining, complex_weights, fields
from surgery.rules._shared.hidden_states import features_of, in_dtype_of

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@rule("bottleneck")
class BottleneckRule(SlotRule):
    """y + s · up(act(down(y))) after a module; with placement "parallel", y + s · up(act(down(x))).

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import BottleneckRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [BottleneckRule("0", size=4)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'down': (4, 16), 'down_bias': (4,), 'up': (16, 4), 'up_bias': (16,)}

    Works on any module that returns a hidden state (…, features), alone or first in a tuple or ModelOutput: a decoder
    layer, an attention, an MLP, a Linear. `up` starts at zero, so the output is unchanged. Tensors have the dtype and
    device of LoRA's. It can't be merged.

    Args:
        size: features of the bottleneck; default 64.
        activation: "relu" (default), "gelu", "silu" or "tanh".
        placement: "after" (default; reads the module's output) or "parallel" (reads its input).
        scale: the factor s; default 1.
        dropout: probability of dropout after the activation while training; default 0.
        features: the hidden state's size; default None: read from the module.

    Raises:
        RuleError: a field is out of range. A module whose features are unknown, or are not the last dimension
            (convolutions), is a problem of the plan.

    Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; parallel: He et al. 2022,
    arXiv:2110.04366. PEFT does not have it.
    """

    size: int = 64
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    placement: Literal["after", "parallel"] = "after"
    scale: float = 1.0
    dropout: float = 0.0
    features: int | None = None

    identity = True
    why_not_merged = "it has an activation in it, and no weight holds that"

    def validate(self) -> None:
        fields.whole(self, "size")
        fields.whole(self, "features", optional=True)
        fields.one_of(self, "activation", *_ACTIVATIONS)
        fields.one_of(self, "placement", "after", "parallel")
        fields.numbers(self, "scale")
        fields.chance(self, "dropout")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "its activation is one of real numbers"):
            return why
        if self.placement == "parallel" and isinstance(module, nn.Embedding):
            return "its input are indices: placement='parallel' has nothing to run on"
        features = features_of(module, self.features)
        return features if isinstance(features, str) else None

    def rewrite(self, site: Site) -> Tensor:
        out = features_of(site.module, self.features)
        inner = features_of(site.module, self.features, "input") if self.placement == "parallel" else out
        assert isinstance(out, int) and isinstance(inner, int)
        down = site.param("down", (self.size, inner), nn.init.kaiming_uniform_)
        down_bias = site.param("down_bias", (self.size,))
        up, up_bias = site.param("up", (out, self.size)), site.param("up_bias", (out,))
        hidden = site.hidden
        x = site.input if self.placement == "parallel" else hidden
        h = _ACTIVATIONS[self.activation](F.linear(site.apply(in_dtype_of, down, x), down, down_bias))
        if self.dropout:
            h = F.dropout(h, self.dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.with_hidden(hidden + F.linear(h, up, up_bias) * self.scale)

    slot_kind = "bottleneck"
    why_no_slot = "the adapters differ in activation or placement"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        bottlenecks = [cast(BottleneckRule, rule) for rule in rules]
        if len({(rule.activation, rule.placement) for rule in bottlenecks}) > 1:
            return None
        features = next((rule.features for rule in bottlenecks if rule.features is not None), None)
        return BottleneckRule(
            size=2, activation=bottlenecks[0].activation, placement=bottlenecks[0].placement, features=features
        )

    def free(self, tensor: str) -> tuple[int, str] | None:
        return {"down": (0, "size"), "down_bias": (0, "size"), "up": (1, "size")}.get(tensor)

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return self.replace(size=len(tensors["down"])), tensors

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        bottleneck = cast(BottleneckRule, slot)
        if (bottleneck.activation, bottleneck.placement) != (self.activation, self.placement):
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot has another activation or placement", where=site.path, fix=fix)
        scaled = {name: site.params[name] * self.scale for name in ("up", "up_bias")}
        return {**site.params, **scaled}

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combining.average(self, shares, how)
