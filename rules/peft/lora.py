"""LoRA in PEFT's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rules._fields import fits
from rules.lora import LoraRule
from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method

SURGERY = 'save_adapter(…, format="surgery") holds any rules'


@peft_method
class Lora(PeftMethod):
    peft_type, rule = "LORA", LoraRule
    init_field = "init_lora_weights"
    inits = {
        True: "kaiming", False: "random", "gaussian": "gaussian", "orthogonal": "orthogonal", "eva": "kaiming",
        "pissa": "pissa", "olora": "olora",
    }  # fmt: skip
    fields = {
        "r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout", "use_dora": "dora",
        "lora_bias": "lora_bias", "bias": "bias",
    }  # fmt: skip
    tensors = {
        "A": "lora_A.weight", "B": "lora_B.weight", "B_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
    }  # fmt: skip
    marks = ("lora_A.weight", "lora_embedding_A")

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        if config.data.get("target_parameters") and not config.data.get("target_modules"):
            config.take("target_modules")
            return []
        return super().read(config)

    def further(self, config: PeftConfig) -> dict[str, Any]:
        config.take("fan_in_fan_out")  # how a weight lies is the module's own affair
        if config.take("use_qalora") is not None and config.data["use_qalora"]:
            raise config.refuse("use_qalora", "it pools the input of quantised layers")
        paths, found = config.targeted(), {}
        for name in ("rank_pattern", "alpha_pattern"):  # PEFT passes over what fits no module
            given = config.take(name, {})
            found[name] = {key: value for key, value in given.items() if any(fits(key, path) for path in paths)} or None
        return found

    def entries(self, place: PeftPlace) -> Mapping[str, PeftEntry]:
        if isinstance(place.module, nn.MultiheadAttention):
            return _attention(place)
        if isinstance(place.module, nn.Embedding):
            return {**super().entries(place), **{name: PeftEntry(f"lora_embedding_{name}") for name in "AB"}}
        return super().entries(place)

    def write(self, rules: Sequence[Rule], modules: Any, on: Mapping[Rule, Sequence[str]]) -> dict[str, Any]:
        found = [rule for rule in rules if isinstance(rule, LoraRule)]
        one = found[0] if len(found) == 1 else _as_one(found, on)
        paths = [path for rule in found for path in on[rule]]
        for path in paths:
            if one.rank_at(path) % getattr(modules.by_path[path], "groups", 1):
                raise _unsaid("a rank that a convolution's groups don't divide", path)
        return super().write([one], modules, {one: paths})

    def said(self, rule: Rule) -> dict[str, Any]:
        assert isinstance(rule, LoraRule)
        return {"rank_pattern": dict(rule.rank_pattern or {}), "alpha_pattern": dict(rule.alpha_pattern or {})}


def _as_one(rules: Sequence[LoraRule], on: Mapping[Rule, Sequence[str]]) -> LoraRule:
    """Several rules that differ in rank and alpha as one with patterns of paths."""
    first, same = rules[0], ("dropout", "dora", "lora_bias", "bias", "rslora", "init")
    if any(getattr(rule, name) != getattr(first, name) for rule in rules for name in same):
        raise _unsaid("LoraRules that differ in more than targets, rank and alpha")
    paths = {path: rule for rule in rules for path in on[rule]}
    ranks = {re.escape(path): rule.rank_at(path) for path, rule in paths.items()}
    alphas = {re.escape(path): rule.alpha_at(path) for path, rule in paths.items()}
    targets = "re:" + "|".join(map(re.escape, paths))
    return first.replace(targets=targets, exclude=(), layers=None, rank_pattern=ranks, alpha_pattern=alphas)


def _attention(place: PeftPlace) -> dict[str, PeftEntry]:
    if not {"A", "out_A"} <= set(place.names) or "magnitude" in place.names:
        raise _unsaid("LoRA on an attention with sizes of its own for key and value, or with DoRA", place.path)
    # PEFT (to 0.21.2) adds the change of the output map twice, live and merged: what it trained is twice the file's B.
    twice = PeftEntry("base_layer.out_proj.lora_B.weight", lambda B: B * 2, lambda B: B / 2)
    inner, outer = PeftEntry("lora_B.weight"), PeftEntry("base_layer.out_proj.lora_A.weight")
    return {"A": PeftEntry("lora_A.weight"), "B": inner, "out_A": outer, "out_B": twice}


def _unsaid(what: str, where: str | None = None) -> SurgeryError:
    return SurgeryError(f"PEFT's format can't hold {what}", where=where, fix=SURGERY)
