"""How a rewrite runs: fast forms of what rules say plainly, with the same mathematics. The only place for them.

A rule writes the low-rank branch as it is in the paper: `y + linear(linear(dropout(x), A), B) * scale`. Run so, it
costs four passes over activations and keeps a dropped-out copy of the input for the backward. `lower` finds the
branch in a woven graph and puts one call in its place, which adds into the base's fresh output instead. The call
takes the plain form wherever the fast one would be wrong or unseen: under torch.compile and torch.export (they do
their own fusing), autocast, mixed precision, torch.func transforms, and sparse or subclass tensors.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["lower", "low_rank_add", "same_dtype"]


def same_dtype(new: Any, old: Any) -> Any:
    """`new` in the dtype of `old`, where both are floating-point tensors; anything else as it is."""
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.dtype != old.dtype:
        if new.is_floating_point() and old.is_floating_point():
            return new.to(old.dtype)
    return new


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, training: bool) -> Tensor:
    """`y + linear(linear(dropout(x, p), A), B) * scale` in the dtype of `y`, which is not used afterwards.

    Shapes: y (…, out), x (…, in), A (r, in), B (out, r).
    """
    dropping = training and p > 0.0
    if not _fast(y, x, A, B):
        branch = x.to(A.dtype)
        if dropping:
            branch = F.dropout(branch, p, True)
        return same_dtype(y + F.linear(F.linear(branch, A), B) * scale, y)
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or A.requires_grad or B.requires_grad):
        return _LowRankAdd.apply(y, x, A, B, scale, p if dropping else 0.0)  # type: ignore[no-any-return]
    if dropping:
        x = F.dropout(x, p, True)
    rows = x.reshape(-1, x.shape[-1])
    y.view(-1, y.shape[-1]).addmm_(rows.mm(A.t()), B.t(), alpha=scale)
    return y


def _fast(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    if torch.compiler.is_compiling() or y.is_nested or x.is_nested or type(y) is not Tensor or type(x) is not Tensor:
        return False
    dtype = y.dtype
    if x.dtype != dtype or A.dtype != dtype or B.dtype != dtype or x.dim() < 2 or not y.is_contiguous():
        return False
    if torch.is_autocast_enabled(y.device.type) or (y.is_leaf and y.requires_grad):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]


class _LowRankAdd(torch.autograd.Function):
    """The branch added into `y`. Keeps x, x·Aᵀ and, with dropout, one byte an entry instead of a dropped-out copy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = None
        if p > 0.0:
            # The draw of torch's own dropout, so that a seed gives the same masks in either form.
            keep = torch.empty_like(x).bernoulli_(1.0 - p)
            mask = keep.bool()
            rows = keep.div_(1.0 - p).mul_(x).view_as(rows)
        down = rows.mm(A.t())
        y.view(-1, y.shape[-1]).addmm_(down, B.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, B, down, mask)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, down, mask = ctx.saved_tensors
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = rows.t().mm(down).mul_(ctx.scale)
        if need_A or need_x:
            up = rows.mm(B).mul_(ctx.scale)
            if need_A:
                if mask is None:
                    dropped = x
                else:
                    dropped = mask * (x / (1.0 - ctx.p))
                grad_A = up.t().mm(dropped.reshape(-1, x.shape[-1]))
            if need_x:
                grad_x = up.mm(A).view(x.shape)
                if mask is not None:
                    grad_x = grad_x.mul_(mask).div_(1.0 - ctx.p)
        return (grad if need_y else None), grad_x, grad_A, grad_B, None, None


# Finding the branch -----------------------------------------------------------------------------------------


def lower(graph: fx.Graph) -> None:
    """Put the fast form in the place of every low-rank branch that is added to a fresh output of a linear layer."""
    for add in list(graph.nodes):
        if add.op == "call_function" and add.target is operator.add and len(add.args) == 2:
            branch = _branch(add.args[1], add.args[0])
            if branch is not None:
                _put(graph, add, *branch)


def _branch(scaled: Any, y: Any) -> tuple | None:
    """The parts (y, x, A, B, scale, p, training) of a low-rank branch, each of whose values has one user."""
    if not (_is(scaled, operator.mul) and isinstance(scaled.args[1], (int, float)) and _fresh(y)):
        return None
    up = scaled.args[0]
    if not (_is(up, F.linear) and _without_bias(up)):
        return None
    down, B = up.args[:2]
    if not (_is(down, F.linear) and _without_bias(down)):
        return None
    x, A = down.args[:2]
    p, training = 0.0, False
    if _is(x, F.dropout) and set(x.kwargs) <= {"p", "training", "inplace"} and not x.kwargs.get("inplace"):
        p, training = x.kwargs.get("p", 0.5), x.kwargs.get("training", True)
        x = x.args[0]
    cast = x
    if not (
        _is(cast, "to") and len(cast.args) == 2 and _is(cast.args[1], getattr) and cast.args[1].args == (A, "dtype")
    ):
        return None
    return y, cast.args[0], A, B, scaled.args[1], p, training


def _without_bias(linear: fx.Node) -> bool:
    return not linear.kwargs and (len(linear.args) == 2 or linear.args[2] is None)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target == target and len(node.users) == 1


def _fresh(y: Any) -> bool:
    # Adding into y is unseen when y was made here, by an operation whose backward does not need its own result.
    # same_dtype compares against it afterwards, by dtype alone.
    makers = (F.linear, low_rank_add)
    if not (isinstance(y, fx.Node) and y.op == "call_function" and y.target in makers):
        return False
    return all(user.target in (operator.add, same_dtype) for user in y.users) and (
        sum(user.target is operator.add for user in y.users) == 1
    )


def _put(graph: fx.Graph, add: fx.Node, *parts: Any) -> None:
    y = parts[0]
    with graph.inserting_before(add):
        fast = graph.call_function(low_rank_add, parts)
    fast.meta.update(add.meta)
    casts = [user for user in add.users if user.target is same_dtype and user.args == (add, y)]
    for cast in casts:  # the fast form keeps y's dtype itself
        cast.replace_all_uses_with(fast)
        graph.erase_node(cast)
    add.replace_all_uses_with(fast)
    graph.erase_node(add)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _effect(node))


def _effect(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_module", "call_function") and name.endswith("_")
