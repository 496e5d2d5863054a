"""Linears with weights of int8, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import ModelEdits, SiteError, StructureRule, register_packed, rule
from surgery.rules.rewrites._int8_weight import Int8Weight

__all__ = ["Int8Linear", "QuantiseRule"]


class Int8Linear(nn.Module):
    """A Linear whose weight is int8, with one scale for each output feature.

    It computes `F.linear(x, weight) * scale + bias`, with the weight cast to the dtype of x. The scale is the largest
    absolute value of a row, divided by 127. So each weight is off by at most half of its row's scale.

    Attributes:
        weight: int8, (out_features, in_features).
        scale: (out_features,), in the dtype of the Linear.
        bias: of the Linear, or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values = linear.weight.detach().float()
        scale = values.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (values / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


register_packed(Int8Weight)


@rule("quantise")
class QuantiseRule(StructureRule):
    """Quantises Linears to int8: the weights alone, with one scale for each output feature.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules.rewrites import QuantiseRule
    >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 8)
    >>> before = model(x)
    >>> _ = apply_rules(model, QuantiseRule(nn.Linear))
    >>> model[0], model[0].weight.dtype
    (Int8Linear(in_features=8, out_features=8, bias=True), torch.int8)
    >>> torch.equal(remove(model)(x), before)
    True

    An `Int8Linear` stands in the place of each target. The model keeps the old modules for `remove`; `commit` releases
    them, and with them their memory.

    Raises:
        SiteError: A target is not exactly an `nn.Linear`, or its weight is also used elsewhere.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1; torchao's `Int8WeightOnlyConfig`.
    """

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        for path, linear in matched:
            if type(linear) is not nn.Linear:
                why = f"it is a {type(linear).__name__}, and not an nn.Linear"
                raise SiteError("this module can't be quantised", where=path, why=why)
            owners = [name for name, parameter in _parameters(edits.model) if parameter is linear.weight]
            if len(owners) > 1:
                why = f"its weight is also {next(name for name in owners if name != f'{path}.weight')}"
                raise SiteError("this Linear can't be quantised", where=path, why=why, fix="exclude it")
            edits.set_module(path, Int8Linear(linear).train(linear.training))
            edits.steps.append((path, "Linear", "int8, one scale a row"))
            edits.unplain.append(f"{path} is an Int8Linear")


def _parameters(model: nn.Module) -> Any:
    return model.named_parameters(remove_duplicate=False)
