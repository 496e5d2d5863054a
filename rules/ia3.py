"""(IA)³: one trained factor per feature, on the output or the input of a linear map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, Pattern, Rule, RuleError, Share, Site, SiteError, SlotRule, rule
from surgery.rules._linear import maps
from surgery.rules._low_rank import swapping
from surgery.rules._shared import combining, complex_weights, fields


@rule("ia3")
class IA3Rule(SlotRule):
    """y = s ⊙ (W x + b); in `feedforward` modules y = W (s ⊙ x) + b. s is trained, W and b are kept.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import IA3Rule
    >>> model = nn.ModuleDict({"key": nn.Linear(8, 6), "down": nn.Linear(32, 8)})
    >>> _ = apply_rules(model, [IA3Rule(["key", "down"], feedforward="down")])
    >>> tuple(model["key"].adapters.default.scale.shape), tuple(model["down"].adapters.default.scale.shape)
    ((6,), (32,))

    Works on Linear, transformers' Conv1D and Conv1d/2d/3d, and on quantised Linears (unmerged). `scale` is (out), or
    (in) in feedforward modules, and float32 on modules in half precision.

    Args:
        feedforward: which targets scale their input: names as in `targets`, or `re:` and a regular expression; default
            (): none. PEFT: feedforward_modules.
        init: "identity" (default; all ones, PEFT's init_ia3_weights=True) or "random" (False: normal).

    Raises:
        RuleError: a field is out of range.

    Source: Liu et al. 2022, arXiv:2205.05638; PEFT's IA3Config.
    """

    feedforward: str | Sequence[str] = ()
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.one_of(self, "init", "identity", "random")
        if not all(isinstance(name, str) for name in self._names()):
            raise self.bad("feedforward", "names of targets")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        layout = maps.linear_map(module, "linear", "conv1d", "convolution")
        return layout if isinstance(layout, str) else None

    def review(self, paths: Sequence[str]) -> Iterable[RuleError]:
        for name in self._names():
            if not any(Pattern.name(name).match(path, nn.Identity()) for path in paths):
                what = f"{self.label}: feedforward has {name!r}, which fits none of its {len(paths)} sites"
                why = "feedforward names those of the targets whose input is scaled"
                yield RuleError(what, why=why, fix="correct it, or name the module in targets, too")

    def rewrite(self, site: Site) -> Tensor | None:
        layout, fed = maps.at(site), self.feeds(site.path)
        size = site.in_features if fed else site.out_features
        scale = site.param("scale", (size,), nn.init.normal_ if self.init == "random" else 1.0)
        if layout.weight_space or (fed and not layout.plain):  # what is around the map may come before the input
            for name in self._scaled(site):
                old = site.tensor(name)
                site.replace(old, self._times(site, name, old, scale).to(old.dtype))
            return None
        scale = scale.view(-1, *(1,) * (len(maps.sizes(layout)) - 2))  # channels stand before the places
        if not fed:
            return site.output * scale
        site.replace(site.input, (site.input * scale).to(site.input.dtype))
        return None

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        scaled = partial(self._times, site, scale=site.params["scale"].detach())
        return {name: scaled(name, site.tensor(name)) for name in self._scaled(site)}

    def swapped(self, live: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        assert isinstance(live, IA3Rule)
        alike = self.feeds(site.path) == live.feeds(site.path)  # which may be said in other words
        swapping.check(self, live, *(["feedforward"] if alike else []))
        return site.params

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        if how.untouched(shares) and not how.lacking(shares):
            return self, shares[0].params
        if not how.plain:
            why = "its numbers multiply, and nothing of them is pruned"
            raise how.refusal(shares, why, "method='svd', 'cat' or 'linear'")
        path, rules = shares[0].site.path, [cast(IA3Rule, share.rule) for share in shares]
        fed = self.feeds(path)
        if any(rule.feeds(path) != fed for rule in rules):
            raise how.refusal(shares, "one scales the input (feedforward), another the output", "exclude it from one")
        scale = how.sum([share.params["scale"] for share in shares], [share.weight for share in shares])
        # "linear" is PEFT's Σ w s, where an adapter that is absent counts as ones. Σ w ΔW is 1 + Σ w (s − 1).
        scale += how.lacking(shares) if how.method == "linear" else 1 - sum(share.weight for share in shares)
        rule = self if combining.all_agree(how, "feedforward") else self.replace(feedforward="re:.*" if fed else ())
        return rule, {"scale": scale}

    def united(self, rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
        by_path = {path: cast(IA3Rule, rule) for path, rule in rules.items()}
        if all(rule.feedforward == self.feedforward for rule in by_path.values()):
            return rules
        fed = [re.escape(path) for path, rule in by_path.items() if rule.feeds(path)]
        return {path: rule.replace(feedforward="re:" + "|".join(fed)) for path, rule in by_path.items()}

    slot_kind = "ia3"
    why_no_slot = "in some adapters it scales the module's input, in others its output"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        fed = {cast(IA3Rule, rule).feeds(path) for rule in rules}
        return IA3Rule(feedforward="re:.*" if fed.pop() else ()) if len(fed) == 1 else None

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        if cast(IA3Rule, slot).feeds(site.path) != self.feeds(site.path):
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot scales the other side of the module", where=site.path, fix=fix)
        return site.params

    def _scaled(self, site: Site | LiveSite) -> list[str]:
        names = ["weight"] if self.feeds(site.path) else ["weight", "bias"]
        return [name for name in names if site.module._parameters.get(name) is not None]

    def _times(self, site: Site | LiveSite, name: str, old: Tensor, scale: Tensor) -> Tensor:
        layout = maps.at(site)
        if name == "bias":
            return old * scale
        if not self.feeds(site.path):
            return old * maps.each_output(layout, scale)
        if layout.parts[0].turned:
            return old * scale.unsqueeze(-1)
        out, size, *kernel = maps.sizes(layout)  # each group of outputs sees its own inputs
        groups = site.in_features // size
        per_group = scale.view(groups, 1, size).expand(groups, out // groups, size)
        return old * torch.reshape(per_group, (out, size, *(1,) * len(kernel)))

    def feeds(self, path: str) -> bool:
        return any(Pattern.name(name).match(path, nn.Identity()) for name in self._names())

    def _names(self) -> Sequence[str]:
        return (self.feedforward,) if isinstance(self.feedforward, str) else self.feedforward
