"""W + scale · L R, multiplied factor by factor: the code of experts reads it in place of its weight."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Factored:
    """Represents `weight + scale · left @ right`, matrices or stacks, and computes the sum only if it is needed.

    Indexing experts indexes their factors. A product with activations (`F.linear`, `@`, `torch.bmm`, a grouped matmul)
    is the weight's product plus the factors' product, computed in the factors' dtype and returned in the weight's. Any
    other access (an attribute, an operator, a torch function) computes the sum once and uses it.

    It is not a Tensor on purpose: a kernel that reads a tensor's memory must fail here, and not read the bare weight.
    """

    def __init__(self, weight: Any, left: Tensor, right: Tensor, scale: float):
        self.weight, self.left, self.right, self.scale = weight, left, right, scale

    def dense(self) -> Tensor:
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.dense()  # or a stack in its codes
        return (weight.to(self.left.dtype) + self.left @ self.right * self.scale).to(weight.dtype)

    def __getitem__(self, index: Any) -> Any:
        if self.weight.dim() == 3 and isinstance(index, (int, slice, Tensor)):
            return Factored(self.weight[index], self.left[index], self.right[index], self.scale)
        return self.dense()[index]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same with the weight in another dtype. The factors keep theirs."""
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.dtype):
            return self.dense().to(*args, **kwargs)
        return Factored(self.weight.to(args[0]), self.left, self.right, self.scale)

    def transpose(self, first: int, second: int) -> Any:
        rank = self.weight.dim()
        if {first % rank, second % rank} == {rank - 2, rank - 1}:
            return Factored(self.weight.transpose(-2, -1), self.right.mT, self.left.mT, self.scale)
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in _OF_WEIGHT else self.dense(), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[call-overload]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if len(args) > 1 and name in _PRODUCTS:
            if type(args[1]) is cls and isinstance(args[0], Tensor):
                return _times(function, args[0], args[1], args[2:], kwargs)
            if type(args[0]) is cls and isinstance(args[1], Tensor) and not kwargs and len(args) == 2:
                return _applied(function, args[0], args[1])
        return function(*_dense(args), **_dense(kwargs))


def factored(weight: Any, left: Tensor, right: Tensor, scale: float) -> Factored:
    return Factored(weight, left, right, scale)


factored.reads_codes = True  # type: ignore[attr-defined]  # of a packed stack, it reads the experts that are picked


def _times(function: Any, x: Tensor, matrix: Factored, more: Any, keywords: dict[str, Any]) -> Tensor:
    """`function(x, matrix, …)`: a product of x with the matrix (for `F.linear`, its transpose), and perhaps a bias."""
    base = function(x, matrix.weight, *more, **keywords)
    left, right = matrix.left, matrix.right
    if function.__name__ == "linear":
        branch = F.linear(F.linear(x.to(right.dtype), right), left)
    elif function.__name__ in _GROUPED:
        # These kernels need one dtype, and rows whose size is a multiple of 16 bytes.
        left, right = left.to(x.dtype), right.to(x.dtype)
        lacking = -right.shape[-2] % (16 // x.element_size())
        # A matrix or its transpose has such rows. The kernel gets the one that has them.
        left, right = F.pad(left, (0, lacking)), F.pad(right, (0, 0, 0, lacking))
        branch = function(function(x, left, *more, **keywords), right, *more, **keywords)
    else:
        branch = function(function(x.to(left.dtype), left), right)
    return base + (branch * matrix.scale).to(base.dtype)


def _applied(function: Any, matrix: Factored, x: Tensor) -> Tensor:
    """`function(matrix, x)`."""
    base = function(matrix.weight, x)
    branch = function(matrix.left, function(matrix.right, x.to(matrix.right.dtype)))
    return base + (branch * matrix.scale).to(base.dtype)


def _dense(value: Any) -> Any:
    if isinstance(value, Factored):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    return {key: _dense(item) for key, item in value.items()} if isinstance(value, dict) else value


def _operator(function: Callable[..., Any], turned: bool = False) -> Any:
    return lambda *args: function(*_dense(args[::-1] if turned else args))


_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # the last is transformers'
_PRODUCTS = (*_GROUPED, "linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm")
_OF_WEIGHT = ("shape", "dtype", "device", "ndim", "dim", "size", "layout", "requires_grad", "is_cuda", "numel")
for _name in ("add", "sub", "mul", "truediv", "neg"):  # Python asks for these on the class alone
    setattr(Factored, f"__{_name}__", _operator(getattr(operator, _name)))
    setattr(Factored, f"__r{_name}__", _operator(getattr(operator, _name), turned=True))
