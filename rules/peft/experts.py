"""LoRA on stacks of experts in PEFT's files: the target_parameters of its LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgery import PeftConfig, PeftEntry, PeftPart, PeftPlace, Rule, SurgeryError, packed_stacks_of, peft_method
from surgery.rules._shared.path_patterns import fits
from surgery.rules.experts import ExpertLoraRule, shape_of
from surgery.rules.peft.extras import targeted_parameters
from surgery.rules.peft.lora import Lora

FIELDS = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}


@peft_method
class ExpertLora(PeftPart):
    rule = ExpertLoraRule
    peft_type, layer = "LORA", "ParamWrapper"

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        named, by_module = config.take("target_parameters"), dict[tuple[str, ...], list[str]]()
        for path, names in targeted_parameters(config).items():
            by_module.setdefault(tuple(names), []).append(path)
        if named and not by_module:
            raise config.refuse("target_parameters", "the model has no such parameters")
        settings = {ours: config.take(theirs) for theirs, ours in FIELDS.items() if config.take(theirs) is not None}
        start = config.take(Lora.init_field, True)
        settings["init"] = {False: "random", "gaussian": "gaussian"}.get(start, "kaiming")
        for parameters, paths in by_module.items():
            full = [f"{path}.{name}" for path in paths for name in parameters]
            patterns: dict[str, Any] = {}
            for field in ("rank_pattern", "alpha_pattern"):
                patterns_given = config.take(field, {})
                patterns[field] = {
                    k: v for k, v in patterns_given.items() if any(fits(k, path) for path in full)
                } or None
            yield ExpertLoraRule(targets=config.regular(paths), parameters=parameters, **settings, **patterns)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        own = list(place.module._parameters)
        parameters = [*(name for name in packed_stacks_of(place.module) if name not in own), *own]
        stacks = [name for name in parameters if f"{name}_A" in place.names]
        entries = {}
        for i, name in enumerate(stacks):  # PEFT wraps the module once for each, the first innermost
            shape, inner = shape_of(place.module, name), "base_layer." * (len(stacks) - 1 - i)
            experts = shape[0]
            if len(shape) == 2:
                entries |= {f"{name}_{which}": PeftEntry(f"{inner}lora_{which}.weight") for which in "AB"}
                continue
            entries[f"{name}_A"] = PeftEntry(
                f"{inner}lora_A.weight", lambda A, e=experts: A.unflatten(0, (e, -1)), lambda A: A.flatten(0, 1)
            )
            entries[f"{name}_B"] = PeftEntry(
                f"{inner}lora_B.weight",
                lambda B, e=experts: B.unflatten(1, (-1, e)).permute(2, 0, 1),
                lambda B: B.permute(1, 2, 0).flatten(1),
            )
        return entries

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        rules = [rule for rule, _ in placed]
        first = rules[0]
        if first.dtype not in (None, "float32"):
            raise SurgeryError(f"PEFT's format can't hold ExpertLoraRule(dtype={first.dtype!r})")
        alike = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
        if any(getattr(rule, name) != getattr(first, name) for rule in rules for name in alike):
            raise SurgeryError("PEFT's format can't hold ExpertLoraRules that differ in more than targets",
                               fix='save_adapter(…, format="surgery")')  # fmt: skip
        named = [f"{p}.{n}" for rule, paths in placed for p in paths for n in rule.names(modules.by_path[p])]
        config: dict[str, Any] = {theirs: getattr(first, ours) for theirs, ours in FIELDS.items()}
        patterns = {"rank_pattern": dict(first.rank_pattern or {}), "alpha_pattern": dict(first.alpha_pattern or {})}
        config |= patterns | {"target_parameters": named}
        config[Lora.init_field] = {"random": False, "gaussian": "gaussian"}.get(first.init, True)
        return config
