"""LoKr: the Kronecker product of two small matrices; each is low-rank where that has fewer numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from surgery import rule
from surgery.rules._low_rank.lycoris import DeltaRule, core, expand_core, has_kernel
from surgery.rules._shared import fields


@rule("lokr")
class LokrRule(DeltaRule):
    """W + (alpha / rank) · w1 ⊗ w2, with w2 = w2_a w2_b where the rank is less than half its size.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import LokrRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(64, 128)), [LokrRule("0", rank=2)])
    >>> {name: tuple(p.shape) for name, p in model[0].adapters.default.named_parameters()}
    {'w1': (8, 8), 'w2_a': (16, 2), 'w2_b': (2, 8)}

    Works on Linear, transformers' Conv1D and Conv1d/2d/3d, and on quantised Linears (unmerged). With out = o · p and
    in/groups = i · j, w1 is (o, i) and w2 is (p, j, *kernel). o ≤ p and i ≤ j are the divisors nearest to each other,
    or o = i = `decompose_factor` where that divides. If rank < max(p, j) / 2, w2 is the product of `w2_a` (p, rank) and
    `w2_b` (rank, j · kernel). Tensors are float32 on modules in half precision.

    Args:
        rank: inner size of the low-rank products; default 8. PEFT: r.
        alpha: numerator of the scale; default 8.
        rank_dropout: probability that a row of the change is zero while training; default 0.
        module_dropout: probability that the whole change is zero while training; default 0.
        use_effective_conv2d: on convolutions, factor the kernel, too: `t2` (rank, rank, *kernel), `w2_a` (rank, p),
            `w2_b` (rank, j); default False.
        init: "identity" (default; w1 is zero, PEFT's init_weights=True), "lycoris" (w2 is zero) or "random" (False).
        rank_pattern: path suffix or regular expression → rank there; default None.
        alpha_pattern: path suffix or regular expression → alpha there; default None.
        decompose_both: w1 = w1_a w1_b, too, where rank < max(o, i) / 2; default False.
        decompose_factor: o and i, where this number divides; default -1: the nearest divisors.
        rank_dropout_scale: with `rank_dropout`, the other rows grow to keep the mean; default False.

    Raises:
        RuleError: a field is out of range.

    Source: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859; PEFT's LoKrConfig.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def validate(self) -> None:
        super().validate()
        fields.flag(self, "decompose_both", "rank_dropout_scale")
        fields.one_of(self, "init", "identity", "lycoris", "random")
        if self.decompose_factor != -1:
            fields.whole(self, "decompose_factor")

    def shapes(self, size: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        (o, p), (i, j) = (factors(features, self.decompose_factor) for features in size[:2])
        low = self.decompose_both and rank < max(o, i) / 2
        first = {"w1_a": (o, rank), "w1_b": (rank, i)} if low else {"w1": (o, i)}
        if rank >= max(p, j) / 2:
            return {**first, "w2": (p, j, *size[2:])}
        if self.use_effective_conv2d and has_kernel(size):
            return {**first, "t2": core(size, rank), "w2_a": (rank, p), "w2_b": (rank, j)}
        return {**first, "w2_a": (p, rank), "w2_b": (rank, j * math.prod(size[2:]))}

    def zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
        return ["w2", "w2_b"] if self.init == "lycoris" else ["w1", "w1_a"]

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        w1 = tensors["w1"] if "w1" in tensors else tensors["w1_a"] @ tensors["w1_b"]
        if "w2" in tensors:
            w2 = tensors["w2"]
        elif "t2" in tensors:
            w2 = expand_core(tensors["t2"], tensors["w2_a"], tensors["w2_b"])
        else:
            w2 = tensors["w2_a"] @ tensors["w2_b"]
        return torch.kron(w1, w2.flatten(1))

    def halves(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first = _thin(tensors["w1"]) if "w1" in tensors else (tensors["w1_a"], tensors["w1_b"])
        if "w2" in tensors:
            second = _thin(tensors["w2"].flatten(1))
        elif "t2" in tensors:
            inner = torch.einsum("ij...,jq->iq...", tensors["t2"], tensors["w2_b"])
            second = tensors["w2_a"].t().clone(memory_format=torch.contiguous_format), inner.flatten(1)
        else:
            second = tensors["w2_a"], tensors["w2_b"]
        return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix as a product of itself and an identity matrix, which has the smaller of its sizes."""
    eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (matrix, eye) if matrix.shape[1] <= matrix.shape[0] else (eye, matrix)


def factors(features: int, factor: int) -> tuple[int, int]:
    """Two divisors, the smaller first: `factor` and its partner if it divides.

    Otherwise the pair nearest to each other whose smaller divisor is at most `factor` (-1: any).
    """
    if factor > 0 and features % factor == 0:
        return factor, features // factor
    small = next(
        d for d in range(min(math.isqrt(features), factor if factor > 0 else features), 0, -1) if features % d == 0
    )
    return small, features // small
