"""RMSNorm written out becomes `F.rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import Const, maybe, one_of
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrites._conditions import drops_nothing

__all__ = ["fuse_rms_norm", "is_rms_norm", "rms_norm", "rms_norm_in_one_dtype", "rms_norm_written_out"]


def fuse_rms_norm(targets: Any = (), *, upcast: bool = True, **fields: Any) -> RewriteRule:
    """RMSNorm written out becomes `F.rms_norm`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import fuse_rms_norm
    >>> sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    >>> model, ids = LlamaModel(LlamaConfig(**sizes)).eval(), torch.randint(0, 50, (2, 6))
    >>> before = model(ids)[0]
    >>> _ = apply_rules(model, fuse_rms_norm(), example_inputs=ids)
    >>> torch.allclose(model(ids)[0], before, atol=1e-6)
    True

    It fits x · rsqrt(mean(x²) + eps) with a weight, with 1 + weight (Gemma), or without a weight. The power may be
    `rsqrt`, `pow(-0.5)`, or a division by `sqrt`.

    Args:
        targets: Where the rule goes; default: everywhere.
        upcast: In half precision, these norms compute in float32. True keeps the casts of the forward, and so also
            the rounding before the product with the weight (Llama). False calls `F.rms_norm` in the dtype of the
            input: one kernel that rounds once, at its end. So the last bits of a half-precision output may differ.
        **fields: Further fields of `RewriteRule`.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    replacement = rms_norm if upcast else rms_norm_in_one_dtype
    return RewriteRule(
        targets, **{"where": is_rms_norm, **fields}, pattern=rms_norm_written_out, replacement=replacement
    )


def rms_norm_written_out(x: Any, w: Any, eps: Any = Const()) -> Any:
    square = one_of(x.pow(2), x * x)
    mean = one_of(square.mean(-1, keepdim=True), square.mean((-1,), keepdim=True)) + eps
    inverse = one_of(torch.rsqrt(mean), torch.pow(mean, -0.5), 1 / torch.sqrt(mean))
    return maybe(one_of(x * inverse, x / torch.sqrt(mean)) * w)


def is_rms_norm(match: RewriteMatch) -> bool:
    """Whether the size is known, and no dropout lies between the operations."""
    return match.shape("x") is not None and drops_nothing(match)


def rms_norm(x: Tensor, w: Tensor | None, eps: float, match: RewriteMatch) -> Tensor:
    """Keeps the forward's dtypes: the norm in float32, and the product with the weight in the dtype it had."""
    size, dtype = (match.shape("x") or ())[-1:], match.dtype("x")
    if dtype in (torch.float16, torch.bfloat16):
        x, dtype = x.float(), torch.float32
    if w is not None and match.shape("w") == size and match.dtype("w") == dtype:
        return F.rms_norm(x, size, w, eps)
    normalised = F.rms_norm(x, size, None, eps)
    return normalised if w is None else normalised.to(match.result_dtype) * w


def rms_norm_in_one_dtype(x: Tensor, w: Tensor | None, eps: float, match: RewriteMatch) -> Tensor:
    size = (match.shape("x") or ())[-1:]
    x = x.to(match.result_dtype)
    if w is not None and match.shape("w") == size:
        return F.rms_norm(x, size, w.to(match.result_dtype), eps)
    normalised = F.rms_norm(x, size, None, eps)
    return normalised if w is None else normalised * w
