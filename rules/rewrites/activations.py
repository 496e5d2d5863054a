"""Activations written out become `F.gelu` and `F.silu`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import one_of
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrites._conditions import drops_nothing, near

__all__ = ["fuse_gelu", "fuse_silu"]


def fuse_gelu(targets: Any = (), *, approximate: str = "none", **fields: Any) -> RewriteRule:
    """GELU written out becomes `F.gelu`.

    >>> import torch
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import fuse_gelu
    >>> from transformers.activations import NewGELUActivation
    >>> model, x = NewGELUActivation(), torch.randn(3)
    >>> before = model(x)
    >>> _ = apply_rules(model, fuse_gelu(approximate="tanh"), example_inputs=x)
    >>> torch.allclose(model(x), before, atol=1e-6)
    True

    The quick GELU, x · sigmoid(1.702 x), is another function: it differs from `F.gelu` by up to 0.02, and stays.

    Args:
        targets: Where the rule goes; default: everywhere.
        approximate: The form that is rewritten: "none" with `erf` (default), or "tanh".
        **fields: Further fields of `RewriteRule`.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError("approximate is 'none' or 'tanh', as for F.gelu")
    pattern, replacement = (gelu_by_erf, gelu) if approximate == "none" else (gelu_by_tanh, gelu_tanh)
    return RewriteRule(targets, pattern=pattern, replacement=replacement, **{"where": drops_nothing, **fields})


def fuse_silu(targets: Any = (), **fields: Any) -> RewriteRule:
    """x · sigmoid(x) becomes `F.silu(x)`.

    Args:
        targets: Where the rule goes; default: everywhere.
        **fields: Further fields of `RewriteRule`.

    Source: Elfwing et al. 2017, arXiv:1702.03118.
    """
    return RewriteRule(targets, pattern=silu_written_out, replacement=silu, **{"where": drops_nothing, **fields})


def gelu_by_erf(x: Any) -> Any:
    ratio = one_of(x / near(math.sqrt(2)), x * near(math.sqrt(0.5)))
    return _half_of_product(x, 1 + torch.erf(ratio))


def gelu_by_tanh(x: Any) -> Any:
    factor, cubic = near(math.sqrt(2 / math.pi)), near(0.044715)
    cube = one_of(cubic * one_of(x.pow(3), x * x * x), cubic * x * x * x)
    square = one_of(cubic * one_of(x.pow(2), x * x), cubic * x * x)
    inner = one_of(factor * (x + cube), factor * x * (1 + square), factor * (x * (1 + square)))
    return _half_of_product(x, 1 + torch.tanh(inner))


def _half_of_product(x: Any, factor: Any) -> Any:
    half = one_of(0.5 * x, x / 2)
    return one_of(half * factor, x * one_of(0.5 * factor, factor / 2), 0.5 * (x * factor), x * factor / 2)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def silu_written_out(x: Any) -> Any:
    return one_of(x * torch.sigmoid(x), x / (1 + torch.exp(-x)))


def silu(x: Tensor) -> Tensor:
    return F.silu(x)
