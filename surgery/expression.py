"""What a structural pattern is written in: values that record the plain PyTorch that is done to them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["ANY", "Expression", "having", "module_of", "one_of", "variable"]


class Expression:
    """A value of a pattern. Operators, methods, `.mT` and torch functions give further ones."""

    __slots__ = ("kind", "of", "args", "kwargs")

    def __init__(self, kind: str, of: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None):
        self.kind, self.of, self.args, self.kwargs = kind, of, args, dict(kwargs or {})

    def __repr__(self) -> str:
        if self.kind == "any":
            return self.of or "ANY"
        return f"{getattr(self.of, '__name__', self.of or self.kind)}(…)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("mT", "T", "mH", "H"):
            return Expression("call_function", getattr, (self, name))
        return lambda *args, **kwargs: Expression("call_method", name, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if getattr(Tensor, name, None) is func:
            return Expression("call_method", name, args, kwargs)
        return Expression("call_function", func, args, kwargs)

    def __getitem__(self, key: Any) -> Expression:
        return Expression("call_function", operator.getitem, (self, key))

    def __neg__(self) -> Expression:
        return Expression("call_function", operator.neg, (self,))

    def __invert__(self) -> Expression:
        return Expression("call_function", operator.invert, (self,))

    def __bool__(self) -> bool:
        raise _wrong("decides on a value", "a structure has no branches: write the alternatives with one_of")

    def __iter__(self) -> Any:
        raise _wrong("goes through a value", "write value[0], value[1]")


def _operator(function: Callable[..., Any], reflected: bool) -> Any:
    def method(self: Expression, other: Any) -> Expression:
        return Expression("call_function", function, (other, self) if reflected else (self, other))

    return method


for _name in "add sub mul truediv floordiv mod pow matmul and or xor".split():
    _function = getattr(operator, _name if hasattr(operator, _name) else _name + "_")
    setattr(Expression, f"__{_name}__", _operator(_function, False))
    setattr(Expression, f"__r{_name}__", _operator(_function, True))
for _name in "lt le gt ge".split():
    setattr(Expression, f"__{_name}__", _operator(getattr(operator, _name), False))

ANY = Expression("any", None)


def variable(name: str) -> Expression:
    return Expression("any", name)


def one_of(*alternatives: Any) -> Any:
    """In a `Structure`: any of these, the first that fits.

    >>> from surgery import ANY, Structure, one_of
    >>> scaled = Structure(lambda q, k: one_of(q @ k.mT * ANY, q @ k.mT / ANY))
    """
    if len(alternatives) < 2:
        raise _wrong("has a one_of with fewer than two alternatives", "write one_of(a, b)")
    return Expression("either", None, alternatives)


def module_of(kind: type[nn.Module] | str, *args: Any) -> Any:
    """In a `Structure`: a call of a module of this class (or a subclass), given by its name as well.

    >>> from torch import nn
    >>> from surgery import Structure, module_of
    >>> mlp = Structure(lambda x: module_of(nn.Linear, module_of("NewGELUActivation", module_of(nn.Linear, x))))
    """
    return Expression("module", kind, args)


def having(value: Any, **asked: Any) -> Any:
    """In a `Structure`: a value whose node has these attributes, of those that `as_digraph` gives.

    `dtype`, `shape` (a tuple in which ANY is any size), `type` (of the module: a class or its name), `path` (of the
    module: what the same string means as a target), `op`, `target`.

    >>> import torch
    >>> from surgery import Structure, having
    >>> half = Structure(lambda x: having(torch.softmax(x, -1), dtype=torch.float16))
    """
    return Expression("having", asked, (value,))


def _wrong(what: str, fix: str) -> SurgeryError:
    return SurgeryError(f"the structure {what}", why="it is written down once, and never run", fix=fix)
