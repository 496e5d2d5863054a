"""LayerNorm written out becomes `F.layer_norm`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import Const, maybe, one_of
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrites._conditions import call_of, drops_nothing, name_of_call

__all__ = ["fuse_layer_norm", "is_layer_norm", "layer_norm", "layer_norm_written_out"]


def fuse_layer_norm(targets: Any = (), **fields: Any) -> RewriteRule:
    """LayerNorm written out becomes `F.layer_norm`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import fuse_layer_norm
    >>> class Norm(nn.Module):
    ...     def forward(self, x):
    ...         mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    ...         return (x - mean) / torch.sqrt(var + 1e-5)
    >>> model, x = Norm(), torch.randn(2, 8)
    >>> _ = apply_rules(model, fuse_layer_norm(), example_inputs=x)
    >>> torch.equal(model(x), torch.nn.functional.layer_norm(x, (8,)))
    True

    It fits the variance as a mean of squares or as `var`, a power of -0.5 or a division, and a weight and a bias or
    none. In half precision, the casts of the forward are kept, as for `fuse_rms_norm`.

    Args:
        targets: Where the rule goes; default: everywhere.
        **fields: Further fields of `RewriteRule`.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    fields = {"where": is_layer_norm, **fields}
    return RewriteRule(targets, pattern=layer_norm_written_out, replacement=layer_norm, **fields)


def layer_norm_written_out(x: Any, w: Any, b: Any, eps: Any = Const()) -> Any:
    centred, again = (x - x.mean(-1, keepdim=True) for _ in range(2))  # forwards may compute it twice (Cohere)
    square = one_of(again.pow(2), again * again)
    variance = one_of(square.mean(-1, keepdim=True), x.var(-1, keepdim=True)) + eps
    inverse = one_of(torch.rsqrt(variance), torch.pow(variance, -0.5), 1 / torch.sqrt(variance))
    return maybe(maybe(one_of(centred * inverse, centred / torch.sqrt(variance)) * w) + b)


def is_layer_norm(match: RewriteMatch) -> bool:
    """Whether the size is known, the variance is that of all features, and nothing is dropped in between."""
    if match.shape("x") is None or not drops_nothing(match):
        return False
    return all(_is_biased(call_of(node)) for node in match.nodes if name_of_call(node) == "var")


def _is_biased(call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    args, kwargs = call
    return kwargs.get("unbiased", args[2] if len(args) > 2 else None) is False or kwargs.get("correction") == 0


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, match: RewriteMatch) -> Tensor:
    size, dtype = (match.shape("x") or ())[-1:], match.dtype("x")
    if dtype in (torch.float16, torch.bfloat16):
        x, dtype = x.float(), torch.float32
    own = [name for name in ("w", "b") if match[name] is not None]
    if all(match.shape(name) == size and match.dtype(name) == dtype for name in own):
        return F.layer_norm(x, size, w, b, eps)
    result = F.layer_norm(x, size, eps=eps).to(match.result_dtype)
    result = result if w is None else result * w
    return result if b is None else result + b
