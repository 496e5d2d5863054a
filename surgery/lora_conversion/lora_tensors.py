"""The LoRA of one module: its rule and its tensors, from the changes of the module's weights and of its bias."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import LowRank
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import MergeError, SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.lora_conversion.lora_factors import LoraFactors, factorise
from surgery.lora_conversion.lora_rule import lora_rule
from surgery.lora_conversion.truncated_svd import RankChoice

__all__ = ["LoraTensors", "lora_tensors", "lost_too_much"]


@dataclass
class LoraTensors:
    """A LoRA rule with the rank of its module, its tensors, and the factors of each weight."""

    rule: Rule
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, LoraFactors]


def lora_tensors(
    path: str,
    module: nn.Module,
    deltas: Mapping[str, LowRank | Tensor],
    bias: Tensor | None,
    choice: RankChoice,
    dtype: torch.dtype | None = None,
) -> LoraTensors:
    """Returns the LoRA that makes these changes, or the nearest one of the chosen rank.

    `dtype`: that of the tensors; None: that of the module, or float32 for half precision. Raises `MergeError` if a
    change is not finite, or LoRA can't hold it.
    """
    possible, factors = lora_rule()[1].weights_at(module), dict[str, LoraFactors]()
    live = LiveSite(module, path, "", {}, lambda name, _: value_at(module, name))
    dtype = live.dtype if dtype is None else dtype
    for name, delta in deltas.items():
        shape, groups = possible[name]
        values = (delta.B, delta.A) if isinstance(delta, LowRank) else (delta,)
        if not all(bool(value.isfinite().all()) for value in values):
            why = f"the change of its {name} has NaN or infinity in it"
            raise MergeError("the site's change is not finite", where=path, why=why, fix="load the weights again")
        factors[name] = factorise(delta, shape, groups, choice, dtype)
        if not all(bool(side.isfinite().all()) for side in (factors[name].change.B, factors[name].change.A)):
            why = f"the factors of the change of its {name} are not finite in {dtype}"
            raise MergeError("the site's change is too large", where=path, why=why, fix="dtype=torch.float32")
    rank = max(part.rank for part in factors.values())
    rank = max(rank, choice.rank or 1) if choice.uniform else rank
    changes = {name: part.padded(rank, possible[name][1]) for name, part in factors.items()}
    own = next(iter(changes.values()))
    for name, (shape, groups) in possible.items():
        if name not in changes:
            zeros = LowRank(own.B.new_zeros(shape[0], 1), own.A.new_zeros(1, math.prod(shape[1:])))
            changes[name] = LoraFactors(zeros, 0.0, 0.0).padded(rank, groups)
    rank = max(len(low_rank.A) for low_rank in changes.values())
    rule, lora = lora_rule(rank, bias is not None, None if dtype == live.dtype else dtype)
    if why := lora.check(module, path):
        raise MergeError("the site's change can't be held by LoRA", where=path, why=why, fix="keep the rule as it is")
    return LoraTensors(rule, lora.tensors_of(live, changes, bias.to(dtype) if bias is not None else None), factors)


def lost_too_much(path: str, factors: Mapping[str, LoraFactors], choice: RankChoice) -> Iterator[SurgeryError]:
    """Yields a problem for each weight that needs a higher rank than the chosen one to keep the tolerance."""
    if choice.rank is None or choice.tolerance is None:
        return
    for name, part in factors.items():
        if part.error > choice.tolerance + 1e-6:
            yield SurgeryError(
                f"rank {choice.rank} loses more than the tolerance",
                where=f"{path}.{name}".strip("."),
                why=f"{part.error:.2%} of the change, and the tolerance is {choice.tolerance:.2%}",
                fix="give a higher rank, a higher tolerance, or only one of the two",
            )
