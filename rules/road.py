"""RoAd: rotates and stretches the output features of a linear map in pairs."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from surgery import LiveSite, Rule, Site, rule
from surgery.rules._linear import maps
from surgery.rules._shared import complex_weights, fields


@rule("road")
class RoadRule(Rule):
    """Each pair of y = W x + b becomes (c y₁ - s y₂, c y₂ + s y₁), with c = α cos θ and s = α sin θ.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import RoadRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6)), [RoadRule("0", group_size=2)])
    >>> {name: tuple(p.shape) for name, p in model[0].adapters.default.named_parameters()}
    {'theta': (3,), 'alpha': (3,)}

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). In each group of neighbouring features,
    those of the first half pair with those of the second. `theta` and `alpha` are float32 on modules in half precision.

    Args:
        variant: "road_1" (default): `theta` and `alpha` have out / 2 numbers, one per pair. "road_2": out, one per
            feature. "road_4": 2 · out, so c and s have their own.
        group_size: features of a group, an even number; default 64.
        init: "identity" (default; PEFT's init_weights=True) or "random" (False).

    Raises:
        RuleError: a field is out of range.

    Source: Liao & Monz 2024, arXiv:2409.00119; PEFT's RoadConfig.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.one_of(self, "variant", "road_1", "road_2", "road_4")
        fields.one_of(self, "init", "identity", "random")
        if type(self.group_size) is not int or self.group_size < 2 or self.group_size % 2:
            raise self.bad("group_size", "an even number from 2")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d")
        if isinstance(layout, str):
            return layout
        out = maps.sizes(layout)[0]
        return f"group_size={self.group_size} does not divide its {out} outputs" if out % self.group_size else None

    def rewrite(self, site: Site) -> Tensor | None:
        size = {"road_1": site.out_features // 2, "road_2": site.out_features, "road_4": site.out_features * 2}
        random = self.init == "random"
        theta = site.param("theta", (size[self.variant],), partial(nn.init.normal_, std=0.5) if random else 0.0)
        alpha = site.param(
            "alpha", (size[self.variant],), partial(nn.init.normal_, mean=1.0, std=0.5) if random else 1.0
        )
        if not maps.at(site).weight_space:
            return self._turned(site.output.to(theta.dtype), theta, alpha)
        for name, new in self._parameters(site, theta, alpha).items():
            site.replace(site.tensor(name), new)
        return None

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        return self._parameters(site, site.params["theta"].detach(), site.params["alpha"].detach())

    def _parameters(self, site: Site | LiveSite, theta: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        """The module's own parameters, rotated."""
        layout, changed = maps.at(site), {}
        rows = maps.rows_of(layout, site.weight).to(theta.dtype)
        changed["weight"] = maps.from_rows(layout, self._turned(rows.t(), theta, alpha).t()).to(site.weight.dtype)
        if site.module._parameters.get("bias") is not None:
            changed["bias"] = self._turned(site.bias.to(theta.dtype), theta, alpha).to(site.bias.dtype)
        return changed

    def _turned(self, y: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
        """Rotates y (…, out)."""
        half = self.group_size // 2
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_1":  # the same for both of a pair
            cos, sin = (t.view(-1, 1, half).expand(-1, 2, half).reshape(-1) for t in (cos, sin))
        elif self.variant == "road_4":
            cos = cos.view(-1, 2, self.group_size)[:, 0].reshape(-1)
            sin = sin.view(-1, 2, self.group_size)[:, 1].reshape(-1)
        pairs = y.unflatten(-1, (-1, 2, half))
        across = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), dim=-2).flatten(-3)
        return y * cos + across * sin
