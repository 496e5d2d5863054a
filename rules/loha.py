"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from surgery import rule
from surgery.rules._low_rank.lycoris import DeltaRule, core, expand_core, has_kernel
from surgery.rules._shared import fields


@rule("loha")
class LohaRule(DeltaRule):
    """W + (alpha / rank) · (w1_a w1_b) ⊙ (w2_a w2_b): a change of rank up to rank², from four thin matrices.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import LohaRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6)), [LohaRule("0", rank=2)])
    >>> {name: tuple(p.shape) for name, p in model[0].adapters.default.named_parameters()}
    {'w1_a': (6, 2), 'w1_b': (2, 8), 'w2_a': (6, 2), 'w2_b': (2, 8)}

    Works on Linear, transformers' Conv1D and Conv1d/2d/3d, and on quantised Linears (unmerged). On a convolution,
    `w1_b` is (rank, in/groups · kernel). Tensors are float32 on modules in half precision.

    Args:
        rank: inner size of each product; default 8. PEFT: r.
        alpha: numerator of the scale; default 8.
        rank_dropout: probability that a row of the change is zero while training; the other rows grow to keep the mean;
            default 0.
        module_dropout: probability that the whole change is zero while training; default 0.
        use_effective_conv2d: on convolutions, factor the kernel, too: `t1` (rank, rank, *kernel), `w1_a` (rank, out)
            and `w1_b` (rank, in/groups), and the same for the second product; default False.
        init: "identity" (default; w2_b is zero, PEFT's init_weights=True) or "random" (False).
        rank_pattern: path suffix or regular expression → rank there; default None.
        alpha_pattern: path suffix or regular expression → alpha there; default None.

    Raises:
        RuleError: a field is out of range.

    Source: Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; LyCORIS, arXiv:2309.14859; PEFT's LoHaConfig.
    """

    def validate(self) -> None:
        super().validate()
        fields.one_of(self, "init", "identity", "random")

    def shapes(self, size: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        out, inner = size[0], math.prod(size[1:])
        if self.use_effective_conv2d and has_kernel(size):
            a, b = (rank, out), (rank, size[1])
            return {"t1": core(size, rank), "w1_a": a, "w1_b": b, "t2": core(size, rank), "w2_a": a, "w2_b": b}
        return {"w1_a": (out, rank), "w1_b": (rank, inner), "w2_a": (out, rank), "w2_b": (rank, inner)}

    def zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
        return ["w2_b"]

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if "t1" in tensors:
            return expand_core(*(tensors[n] for n in ("t1", "w1_a", "w1_b"))) * expand_core(
                *(tensors[n] for n in ("t2", "w2_a", "w2_b"))
            )
        return (tensors["w1_a"] @ tensors["w1_b"]) * (tensors["w2_a"] @ tensors["w2_b"])

    def halves(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (self._thin(tensors, number) for number in "12")
        return _pairs(first[0].t(), second[0].t()).t(), _pairs(first[1], second[1])

    def _thin(self, tensors: Mapping[str, Tensor], number: str) -> tuple[Tensor, Tensor]:
        """The two factors of the first or the second matrix."""
        a, b = tensors[f"w{number}_a"], tensors[f"w{number}_b"]
        if "t1" not in tensors:
            return a, b
        return a.t(), torch.einsum("ij...,jq->iq...", tensors[f"t{number}"], b).flatten(1)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """The product of every row of `a` with every row of `b`."""
    return (a.unsqueeze(1) * b.unsqueeze(0)).flatten(0, 1)
