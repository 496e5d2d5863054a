"""A linear layer with low-rank branches as one operation with its own backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from surgery.forward.graph_functions import same_dtype

__all__ = ["use_layer_operation", "low_rank_linear"]


# A, B, scale, dropout probability, and whether dropout is on: y + linear(linear(dropout(x), A), B) * scale
Branch = tuple[Tensor, Tensor, float, float, bool]


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor:
    """Returns `linear(x, weight, bias)` with low-rank branches added, in the dtype of the layer's own output.

    Shapes: x (…, in), weight (out, in), bias (out), A (r, in), B (out, r).
    """
    if not _fast(x, weight, bias, branches):
        return _plain(x, weight, bias, branches)
    if torch.is_grad_enabled() and _trained(x, weight, bias, branches):
        settings = tuple((scale, p if training else 0.0) for _, _, scale, p, training in branches)
        factors = [tensor for A, B, *_ in branches for tensor in (A, B)]
        return _LowRankLinear.apply(settings, x, weight, bias, *factors)  # type: ignore[no-any-return]
    y = F.linear(x, weight, bias)
    for A, B, scale, p, training in branches:
        branch_input = F.dropout(x, p, True) if training and p > 0.0 else x
        if x.numel() == x.shape[-1]:  # one token: matrix times vector
            y.view(-1).addmv_(B, A.mv(branch_input.reshape(-1)), alpha=scale)
        else:
            _add(y, _down(branch_input, A), B, scale)
    return y


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> Tensor:
    if _layer_operation is not None and not any(training and p > 0.0 for _, _, _, p, training in branches):
        factors = [tensor for A, B, *_ in branches for tensor in (A, B)]
        return _layer_operation(x, weight, bias, factors, [scale for _, _, scale, *_ in branches])
    y = F.linear(x, weight, bias)
    for A, B, scale, p, training in branches:
        branch = x.to(A.dtype)
        if training and p > 0.0:
            branch = F.dropout(branch, p, True)
        y = same_dtype(y + _low_rank(branch, A, B, scale), y)
    return y


def _low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns linear(linear(x, A), B) * scale."""
    if not _compiled_training(x, A, B):
        branch = F.linear(F.linear(x, A), B)
        return branch if scale == 1.0 else branch * scale
    # Autograd orders the gradient of a product by the strides of its factors. With these strides, the rank is the
    # first dimension in the gradients, too. Scaling B, which is small, saves a pass over the output and its gradient.
    up = (B.t() if scale == 1.0 else B.t() * scale).contiguous()
    return _down(x, A).t().mm(up).reshape(*x.shape[:-1], len(B))


def _compiled_training(*tensors: Tensor) -> bool:
    """Whether torch.compile traces a training step for the CPU, where the order of thin products matters."""
    if not is_dynamo_compiling() or is_exporting() or not torch.is_grad_enabled():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # already loaded, because Dynamo runs

    return all(
        type(tensor) in _ORDINARY
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and guard_or_false(tensor.numel() > 0)  # autograd reads the strides, which depend on sizes
        for tensor in tensors
    )


# Computes a layer with its branches: (x, weight, bias, [A, B, A, B, …], scales) → output.
LayerOperation = Callable[[Tensor, Tensor, Tensor | None, list[Tensor], list[float]], Tensor]
_layer_operation: LayerOperation | None = None  # set while a model is exported


@contextmanager
def use_layer_operation(operation: LayerOperation) -> Iterator[None]:
    """Inside the block, a layer in the plain form calls `operation`, which an exporter translates."""
    global _layer_operation
    before, _layer_operation = _layer_operation, operation
    try:
        yield
    finally:
        _layer_operation = before


def _fast(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> bool:
    """Whether the fast form computes the same as the plain form, and nothing needs to see the single operations."""
    # After a large product Python runs with cold caches, so each check slows down a decoder's step: few and simple.
    if is_compiling() or is_autocast() or functorch_stack() is not None or forward_ad._current_level >= 0:
        return False
    if jit_tracing_state():
        return False
    dtype = x.dtype
    if type(x) not in _ORDINARY or x.layout is not torch.strided or x.is_nested:
        return False
    if not dtype.is_floating_point or weight.dtype is not dtype or type(weight) not in _ORDINARY:
        return False
    if bias is not None and (bias.dtype is not dtype or type(bias) not in _ORDINARY):
        return False
    for A, B, *_ in branches:
        if A.dtype is not dtype or B.dtype is not dtype or type(A) not in _ORDINARY or type(B) not in _ORDINARY:
            return False
    return True


def _trained(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> bool:
    if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return any(A.requires_grad or B.requires_grad for A, B, *_ in branches)


_ORDINARY = (Tensor, nn.Parameter)
is_compiling, is_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled
is_dynamo_compiling, is_exporting = torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting
functorch_stack = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
jit_tracing_state = torch._C._get_tracing_state


def _down(x: Tensor, A: Tensor) -> Tensor:
    """Returns A xᵀ, of shape (r, tokens)."""
    return A.mm(x.reshape(-1, x.shape[-1]).t())


def _add(y: Tensor, down: Tensor, B: Tensor, scale: float) -> None:
    """Add (B · down)ᵀ · scale to y in place."""
    y.view(-1, y.shape[-1]).addmm_(down.t(), B.t(), alpha=scale)


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Returns x with dropped entries, the mask, and the factor that the remaining entries still need.

    The random numbers are drawn like F.dropout's, so a seed gives the same masks in both forms.
    """
    if x.device.type != "cpu":
        dropped, mask = torch.native_dropout(x, p, True)
        return dropped, mask, 1.0
    noise = torch.empty_like(x).bernoulli_(1.0 - p)
    mask = noise.bool()
    return noise.mul_(x), mask, 1.0 / (1.0 - p)


class _LowRankLinear(torch.autograd.Function):
    """A layer with branches. For the backward it saves x, A xᵀ, and with dropout a mask of one byte for each entry."""

    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        _, _, need_weight, _, *need_factors = ctx.needs_input_grad
        downs: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        for (scale, p), A, B, need_B in zip(settings, factors[::2], factors[1::2], need_factors[1::2], strict=True):
            branch_input, mask, gain = _drop(x, p) if p > 0.0 else (x, None, 1.0)
            down = _down(branch_input, A)
            _add(y, down, B, scale * gain)
            downs.append(down if need_B else None)
            masks.append(mask)
        saved_input = x if need_weight or any(need_factors[::2]) else None
        ctx.settings = settings
        ctx.save_for_backward(saved_input, weight, bias, *factors, *downs, *masks)
        # Autograd forbids in-place writes to a view that was created here. A layer's output must allow them.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad)
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(grad.device.type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _, *saved = ctx.saved_tensors
    _, need_x, need_weight, need_bias, *need_factors = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    inputs: Any = None if x is None else x.reshape(-1, x.shape[-1])  # saved if A or W is trained
    grad_x = rows.mm(weight) if need_x else None
    grad_factors: list[Tensor | None] = []
    for index, (scale, p, A, B, down, mask) in enumerate(_branches(ctx.settings, saved)):
        need_A, need_B = need_factors[2 * index : 2 * index + 2]
        scale = scale / (1.0 - p)
        grad_A = grad_B = None
        if need_B:
            grad_B = down.mm(rows).mul_(scale).t()
        if need_A or grad_x is not None:
            up = B.t().mm(rows.t()).t().contiguous().mul_(scale)
            keep = None if mask is None else mask.reshape(-1, A.shape[1]).to(grad.dtype)
            if grad_x is not None:
                grad_x = grad_x.addmm_(up, A) if keep is None else grad_x.addcmul_(up.mm(A), keep)
            if need_A:
                grad_A = up.t().mm(inputs if keep is None else keep.mul_(inputs))
        grad_factors += [grad_A, grad_B]
    return (
        None,
        None if grad_x is None else grad_x.view(*grad.shape[:-1], weight.shape[1]),
        rows.t().mm(inputs) if need_weight else None,
        rows.sum(0) if need_bias else None,
        *grad_factors,
    )


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients for create_graph=True, computed by the plain form with the masks of the forward."""
    x, weight, bias, *saved = ctx.saved_tensors
    if x is None:
        raise RuntimeError("gradients of gradients need the layer's input, which is kept only where A or W is trained")
    y = F.linear(x, weight, bias)
    for scale, p, A, B, _, mask in _branches(ctx.settings, saved):
        branch_input = x if mask is None else x * mask.to(x.dtype) / (1.0 - p)
        y = y + F.linear(F.linear(branch_input, A), B) * scale
    count = 2 * len(ctx.settings)
    tensors: tuple[Any, ...] = (None, x, weight, bias, *saved[:count])
    differentiated = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, differentiated, grad, create_graph=True))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)


def _branches(settings: Any, saved: list[Any]) -> Iterator[tuple[float, float, Tensor, Tensor, Any, Any]]:
    """Yields each branch's scale, p, A, B, A xᵀ and mask."""
    count = len(settings)
    factors, downs, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
    for (scale, p), A, B, down, mask in zip(settings, factors[::2], factors[1::2], downs, masks, strict=True):
        yield scale, p, A, B, down, mask
