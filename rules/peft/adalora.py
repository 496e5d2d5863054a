"""AdaLoRA in PEFT's files, where sites that lost directions while training are stored without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules.adalora import AdaLoraRule
from surgery.rules.allocate import RankAllocator, orthogonal_loss


@peft_method
class AdaLora(PeftMethod):
    peft_type, rule = "ADALORA", AdaLoraRule
    lacks, biased = ("ensure_weight_tying",), True
    fields = {"init_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"} | {
        name: name
        for name in ("target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2", "orth_reg_weight")
    }
    tensors = {name: f"lora_{name}" for name in "AEB"}
    init_field = "init_lora_weights"

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("r", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora")  # which PEFT does not use
        start = config.data.get("init_lora_weights", True)  # of which PEFT asks no more than whether it is true
        return {"init": "identity" if start or start is None else "random"}

    def write_fields(self, rule: Rule) -> dict[str, Any]:
        assert isinstance(rule, AdaLoraRule)
        if rule.total_step is None:
            raise SurgeryError(
                "PEFT's format can't hold this AdaLoraRule",
                why="PEFT loads no AdaLoRA without total_step",
                fix='AdaLoraRule(…, total_step=…); save_adapter(…, format="surgery") holds any rules',
            )
        return {"rank_pattern": None}  # all directions are written, those without effect as zeros

    def loss_of(self, model: nn.Module, adapter: str) -> Tensor | None:
        return orthogonal_loss(model, adapter)

    def allocator_of(self, model: nn.Module, adapter: str) -> RankAllocator:
        return RankAllocator(model, adapter)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        directions = _kept_directions(place)
        assert isinstance(place.rule, AdaLoraRule)
        rows = columns = _same
        if directions is not None:
            rank = place.rule.rank
            rows, columns = _spread(directions, rank, 0), _spread(directions, rank, 1)
        if not isinstance(place.module, nn.Conv2d):
            return {"A": PeftEntry("lora_A", rows), "E": PeftEntry("lora_E", rows), "B": PeftEntry("lora_B", columns)}
        kernel = place.module.weight.shape[1:]  # PEFT's factors of a kernel are matrices
        return {
            "A": PeftEntry("lora_A", lambda A: rows(A).unflatten(1, kernel), lambda A: A.flatten(1)),
            "E": PeftEntry("lora_E", rows),
            "B": PeftEntry("lora_B", lambda B: columns(B)[..., None, None], lambda B: B.flatten(1)),
        }


def _kept_directions(place: PeftPlace) -> list[int] | None:
    """Which directions of a site are left, by rank_pattern; None for all."""
    for name, flags in (place.config.get("rank_pattern") or {}).items():
        if name.rpartition(".")[0] == place.path and isinstance(flags, list):
            flat = [bool(flag[0] if isinstance(flag, list) else flag) for flag in flags]
            return None if all(flat) else [i for i, flag in enumerate(flat) if flag]
    return None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _spread(directions: list[int], rank: int, dim: int) -> Callable[[Tensor], Tensor]:
    """The directions that are left in their places, and zeros in the others: they add nothing, and the scale stays."""

    def read(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if shape[dim] != len(directions) or max(directions, default=-1) >= rank:
            raise ValueError("the file has other directions than its rank_pattern")
        shape[dim] = rank
        return tensor.new_zeros(shape).index_copy(dim, torch.tensor(directions, device=tensor.device).long(), tensor)

    return read
