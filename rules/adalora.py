"""AdaLoRA: a low-rank change as singular values and vectors; training moves rank between sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from surgery import Combination, Rule, Share, rule
from surgery.rules._linear import delta
from surgery.rules._linear.layouts import WeightPart
from surgery.rules._low_rank.method import LowRankMethod
from surgery.rules._low_rank.rule import LowRankRule, TensorSource
from surgery.rules._shared import combining, complex_weights, fields


@rule("adalora")
class AdaLoraRule(LowRankMethod):
    """y = W x + alpha / (rank + 0.00001) · B diag(E) A x: a low-rank change whose ranks a `RankAllocator` distributes.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import AdaLoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [AdaLoraRule("0", rank=4, total_step=100)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'A': (4, 32), 'E': (4, 1), 'B': (16, 4)}

    Works on Linear, transformers' Conv1D, Conv2d without groups and quantised Linears (unmerged). A (rank, in) and B
    (out, rank) start normal with deviation 0.02. E (rank, 1) starts at zero, so the output is unchanged. Of a
    convolution, A and B are kernels. Defaults are PEFT's.

    Args:
        rank: rank of every site at the start; default 12. PEFT: init_r.
        alpha: numerator of the scale; default 8. PEFT: lora_alpha.
        dropout: probability of dropout on the branch's input while training; default 0. PEFT: lora_dropout.
        target_r: the mean rank that `RankAllocator` comes to; default 8.
        tinit: steps before the first rank is taken away; default 0.
        tfinal: steps at the end in which the ranks stay; default 0.
        deltaT: steps between two allocations; default 1.
        total_step: steps of the training; default None. `RankAllocator` needs it.
        beta1: decay of the mean importance, between 0 and 1; default 0.85.
        beta2: decay of the importance's uncertainty, between 0 and 1; default 0.85.
        orth_reg_weight: factor of `orthogonal_loss`; default 0.5. Add that loss to the training loss yourself; PEFT's
            model adds it by itself.
        init: "identity" (default; PEFT's init_lora_weights=True) or "random": A, E and B start normal with deviation 1
            (False).

    Raises:
        RuleError: a field is out of range, or `tinit + tfinal` is not less than `total_step`.

    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's AdaLoraConfig.
    """

    rank: int = 12
    alpha: float = 8
    dropout: float = 0.0
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    init: Literal["identity", "random"] = "identity"

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def validate(self) -> None:
        super().validate()
        fields.one_of(self, "init", "identity", "random")
        fields.whole(self, "target_r", "deltaT")
        fields.whole(self, "tinit", "tfinal", least=0)
        fields.numbers(self, "beta1", "beta2", low=0, high=1)
        fields.numbers(self, "orth_reg_weight", low=-1e-9)
        if self.total_step is not None:
            fields.whole(self, "total_step")
            if self.tinit >= self.total_step - self.tfinal:
                raise self.bad("total_step", "more than tinit + tfinal")

    def scale_at(self, path: str) -> float:
        return self.alpha / (self.rank + 1e-5)

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return super().check(module, path)
        if why := delta.why_no_map(module):
            return f"{why}, and on Conv2d without groups"
        return None

    def factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        start, zero = (nn.init.normal_, nn.init.normal_) if self.init == "random" else (_normal, 0.0)
        A, E = tensor("A", part.A, start), tensor("E", (part.A[0], 1), zero)
        if len(part.A) > 2:  # of a convolution
            E = E.view(-1, *[1] * (len(part.A) - 1))
        return A * E, tensor("B", part.B, start)

    def tensors_for(self, part: WeightPart, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        sizes = A.flatten(1).norm(dim=1, keepdim=True)  # E: of rows that are not all zero, their size
        by_row = sizes.masked_fill(sizes == 0, 1.0).view(-1, *[1] * (A.dim() - 1))
        return {"A": A / by_row, "E": sizes, "B": B}

    def resized(self, rank: int, **changes: Any) -> LowRankRule:
        return super().resized(rank, target_r=min(self.target_r, rank), **changes)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        if how.untouched(shares):
            return self, shares[0].params
        if how.method != "cat" and not how.by_matrix:
            raise how.refusal(
                shares, "sums of its three factors are not a sum of their product", "method='cat', or 'svd'"
            )
        return super().combined(shares, how)


def _normal(tensor: Tensor) -> Tensor:
    return nn.init.normal_(tensor, std=0.02)
