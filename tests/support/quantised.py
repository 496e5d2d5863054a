"""Quantised Linears of every backend, each made from a plain Linear. Tests and `make quantised` run over them."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class QuantisedLinear:
    """One layout of one backend.

    Attributes:
        name: the row's name, such as "bitsandbytes Linear4bit nf4".
        package: the package that must be there.
        make: makes a quantised module from a plain Linear, which it may change.
        exact: whether the module multiplies with the dequantised weight and plain inputs: `F.linear` on a unit matrix
            has the bits of the dequantised weight.
        slack: how far the module's output may be from `F.linear` on the dequantised weight, as a share of its norm.
    """

    name: str
    package: str
    make: Callable[[nn.Linear], nn.Module]
    exact: bool = True
    slack: float = 1e-5

    def build(self, linear: nn.Linear) -> nn.Module:
        """The quantised module. Raises ImportError where the package is absent."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(self.package)
            return self.make(linear)


def _int8(linear: nn.Linear) -> nn.Module:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    sizes = (linear.in_features, linear.out_features)
    new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=linear.bias is not None, has_fp16_weights=False)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def _bits4(quant_type: str, nested: bool, dtype: torch.dtype | None = None) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        sizes = (linear.in_features, linear.out_features)
        settings: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": nested, "compute_dtype": dtype}
        new = bitsandbytes.nn.Linear4bit(*sizes, bias=linear.bias is not None, **settings)
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return make


def _torchao(config: Callable[[Any], Any]) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        quantization: Any = importlib.import_module("torchao.quantization")
        quantization.quantize_(linear, config(quantization))
        return linear

    return make


INT4: Any = getattr(torch, "int4")  # noqa: B009  # which torch's stubs lack

BACKENDS: list[QuantisedLinear] = [
    QuantisedLinear("bitsandbytes Linear8bitLt", "bitsandbytes", _int8, exact=False, slack=3e-2),
    QuantisedLinear("bitsandbytes Linear4bit nf4", "bitsandbytes", _bits4("nf4", False)),
    QuantisedLinear("bitsandbytes Linear4bit nf4, double", "bitsandbytes", _bits4("nf4", True)),
    QuantisedLinear("bitsandbytes Linear4bit fp4", "bitsandbytes", _bits4("fp4", False)),
    QuantisedLinear("torchao int8", "torchao", _torchao(lambda q: q.Int8WeightOnlyConfig())),
    QuantisedLinear(
        "torchao int8, dynamic",
        "torchao",
        _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()),
        exact=False,
        slack=3e-2,
    ),
    QuantisedLinear(
        "torchao int4, blocks of 32",
        "torchao",
        _torchao(lambda q: q.IntxWeightOnlyConfig(INT4, q.PerGroup(32), q.MappingType.ASYMMETRIC)),
    ),
    QuantisedLinear(
        "torchao int4, dynamic",
        "torchao",
        _torchao(lambda q: q.Int8DynamicActivationIntxWeightConfig(INT4, q.PerGroup(32))),
        exact=False,
        slack=3e-2,
    ),
    QuantisedLinear("torchao float8", "torchao", _torchao(lambda q: q.Float8WeightOnlyConfig())),
]
BY_NAME = {backend.name: backend for backend in BACKENDS}
