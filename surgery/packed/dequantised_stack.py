"""Stands in for a stack of packed matrices in the code of experts, and dequantises the matrices that the code picks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.packed_stack import PackedStack, packed_stacks_of

__all__ = ["DequantisedStack", "dequantised_stack", "lazy_stack"]


class DequantisedStack:
    """The dequantised numbers of a stack, computed where the code of experts needs them.

    Indexing picks experts, whose codes are not read yet. A product with activations dequantises the picked matrices,
    and its backward dequantises them again, so nothing dequantised is kept. Any other access (an attribute, a torch
    function) computes the plain tensor and uses it.

    It is not a Tensor on purpose: a kernel that reads a tensor's memory must fail here.
    """

    def __init__(
        self,
        stack: PackedStack,
        dtype: torch.dtype | None = None,
        experts: Tensor | None = None,
        single: bool = False,
        turned: bool = False,
    ):
        self._stack, self._experts, self._single, self._turned = stack, experts, single, turned
        self._dtype = dtype or stack.dtype

    def dense(self) -> Tensor:
        """The plain tensor."""
        with torch.no_grad():
            stack, experts = self._stack, self._experts
            values = stack.dequantise() if experts is None else stack.dequantise_experts(experts)
            values = (values[0] if self._single else values).to(self._dtype)
        return values.mT if self._turned else values

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._stack.device

    @property
    def shape(self) -> torch.Size:
        count, rows, columns = self._stack.shape
        matrix = (columns, rows) if self._turned else (rows, columns)
        return torch.Size(matrix if self._single else (count if self._experts is None else len(self._experts), *matrix))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same in another dtype."""
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.dtype):
            return self.dense().to(*args, **kwargs)
        return DequantisedStack(self._stack, args[0], self._experts, self._single, self._turned)

    def transpose(self, first: int, second: int) -> Any:
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return DequantisedStack(self._stack, self._dtype, self._experts, self._single, not self._turned)
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def __getitem__(self, index: Any) -> Any:
        numbers = isinstance(index, (int, Tensor)) and not isinstance(index, bool)
        if self._experts is not None or not numbers:
            return self.dense()[index]
        picked = torch.as_tensor(index, device=self.device)
        if picked.dim() > 1 or picked.dtype is torch.bool:
            return self.dense()[index]
        return DequantisedStack(self._stack, self._dtype, picked.reshape(-1).long(), picked.dim() == 0, self._turned)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[call-overload]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.__name__
        if name in _PRODUCTS and not kwargs and len(args) == 2 and isinstance(args[0], Tensor) and type(args[1]) is cls:
            x, matrix = args
            differentiable = torch.is_grad_enabled() and x.requires_grad
            if differentiable and (matrix.dim() == 2 or name == "bmm"):
                return _Product.apply(x, matrix, function)
        return function(*_dense(args), **_dense(kwargs))


class _Product(torch.autograd.Function):
    """A product of activations with a stack. Its backward dequantises the stack again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: DequantisedStack, function: Any) -> Tensor:
        ctx.matrix = matrix.mT if function.__name__ == "linear" else matrix
        ctx.dtype = x.dtype
        return function(x, matrix.dense())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (grads[0] @ ctx.matrix.to(grads[0].dtype).mT.dense()).to(ctx.dtype), None, None


def dequantised_stack(module: nn.Module, name: str) -> Tensor:
    """The dequantised stack of a module: what graphs of rewritten forwards read as the parameter."""
    return lazy_stack(module, name).dense()


def lazy_stack(module: nn.Module, name: str) -> DequantisedStack:
    """The stand-in for a stack of a module, for functions that read a stack in its codes."""
    stack = packed_stacks_of(module).get(name)
    if stack is None:
        raise SiteError(
            f"the {name} of this {type(module).__name__} can't be read",
            why="a rule reads the dequantised stack, and the module is not quantised any more",
            fix="remove the adapter, and put it on again",
        )
    return DequantisedStack(stack)


def _dense(value: Any) -> Any:
    if isinstance(value, DequantisedStack):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    return {key: _dense(item) for key, item in value.items()} if isinstance(value, dict) else value


def _operator(name: str) -> Any:
    method = getattr(Tensor, name)
    return functools.wraps(method)(lambda self, *args: method(self.dense(), *_dense(args)))


_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm")
for _name in ("add", "sub", "mul", "truediv"):  # Python asks for these on the class alone
    setattr(DequantisedStack, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(DequantisedStack, f"__r{_name}__", _operator(f"__r{_name}__"))
DequantisedStack.__neg__ = _operator("__neg__")  # type: ignore[attr-defined]
