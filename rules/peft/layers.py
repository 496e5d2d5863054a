"""PEFT's `layer_replication`: layers of the base that are repeated with their weights, below an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgery import PeftConfig, PeftPart, Rule, SurgeryError, peft_method
from surgery.rules.layers import RepeatRule

FIELD = "layer_replication"


@peft_method
class Replicated(PeftPart):
    rule = RepeatRule

    def structure(self, config: PeftConfig) -> Iterable[Rule]:
        if config.data.get("peft_type") != "LORA":  # PEFT's other methods do not have the field
            return []
        ranges = config.take(FIELD)
        if not ranges:
            return []
        if not isinstance(ranges, (list, tuple)) or not all(map(_is_range, ranges)):
            raise config.refuse(FIELD, "it is not a list of pairs of numbers", "give [[0, 4], [2, 5]]")
        path = _layers_path(config.model)
        if path is None:
            fix = "repeat the layers with RepeatRule, and leave the field out"
            raise config.refuse(FIELD, "the model does not have its layers where PEFT looks for them", fix)
        order = [index for start, end in ranges for index in range(start, end)]
        if not order:
            raise config.refuse(FIELD, "no layer is left", "give ranges [start, end) with start < end")
        return [RepeatRule(path, order=order, shared=True)]

    def base(self, config: PeftConfig) -> Iterable[Rule]:
        return self.structure(config)

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        (rule, _), *more = placed
        path = _layers_path(modules.model)
        if more or not rule.shared or path is None or modules.matched(rule) != {path}:
            raise _unsupported(f"this RepeatRule on {rule.targets}")
        count = len(modules.by_path[path])
        order = rule.order if rule.order is not None else [*range(count // rule.times)] * rule.times
        if len(order) != count:
            raise _unsupported("a RepeatRule whose layers another rule changed since")
        return {FIELD: _ranges(order)}


def _is_range(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)


def _layers_path(model: nn.Module) -> str | None:
    """The path of the list of layers where PEFT looks for it; None if it is not there."""
    module, path = model, list[str]()
    while isinstance(getattr(module, "model", None), nn.Module):
        module, path = module.model, [*path, "model"]  # type: ignore[assignment]
    if isinstance(getattr(module, "bert", None), nn.Module):
        module, path = module.bert, [*path, "bert"]  # type: ignore[assignment]
    for name in ("layers", "encoder.layer", "h"):
        owner: Any = module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if owner is not None:
            return ".".join([*path, name]) if isinstance(owner, nn.ModuleList) else None
    return None


def _ranges(order: Sequence[int]) -> list[list[int]]:
    """The order as ranges [start, end), each as long as it can be."""
    ranges: list[list[int]] = []
    for index in order:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    return ranges


def _unsupported(what: str) -> SurgeryError:
    return SurgeryError(
        f"PEFT's format can't hold {what}",
        why=f"its {FIELD} repeats the layers of Llama, Bert and Falcon, which share their weights",
        fix='save_adapter(…, format="surgery") holds any rules',
    )
