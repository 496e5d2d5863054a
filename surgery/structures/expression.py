"""The values in which structural patterns are written: they record the plain PyTorch operations on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["ANY", "Const", "Expression", "having", "maybe", "module_of", "one_of", "variable"]


class Expression:
    """A value of a pattern. Operators, methods, `.mT` and torch functions create further expressions."""

    __slots__ = ("kind", "of", "args", "kwargs")

    def __init__(self, kind: str, of: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None):
        self.kind, self.of, self.args, self.kwargs = kind, of, args, dict(kwargs or {})

    def __repr__(self) -> str:
        if self.kind == "any":
            return self.of or "ANY"
        if self.kind == "const":
            return f"Const({self.of or ''})"
        return f"{getattr(self.of, '__name__', self.of or self.kind)}(…)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("T", "H"):
            name = "m" + name  # torch defines .T and .H for matrices only
        if name in ("mT", "mH", "values", "indices"):
            return Expression("call_function", getattr, (self, name))
        return lambda *args, **kwargs: Expression("call_method", name, (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if getattr(Tensor, name, None) is func:
            return Expression("call_method", name, args, kwargs)
        return Expression("call_function", func, args, kwargs)

    def __call__(self, *args: Any) -> Expression:
        if self.kind != "module" or self.args:
            raise _wrong("calls a value", "give the parameter a default: norm=module_of(nn.LayerNorm)")
        return Expression("module", self.of, args, self.kwargs)

    def __getitem__(self, key: Any) -> Expression:
        return Expression("call_function", operator.getitem, (self, key))

    def __neg__(self) -> Expression:
        return Expression("call_function", operator.neg, (self,))

    def __invert__(self) -> Expression:
        return Expression("call_function", operator.invert, (self,))

    def __bool__(self) -> bool:
        raise _wrong("branches on a value", "write the alternatives with one_of")

    def __iter__(self) -> Any:
        raise _wrong("iterates over a value", "write value[0], value[1]")


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
"""In a `Structure`: any value. It fits every node and binds no name."""


def variable(name: str) -> Expression:
    return Expression("any", name)


def one_of(*alternatives: Any) -> Any:
    """In a `Structure`: match any of several alternatives. The first that fits is taken.

    >>> from surgery import ANY, Structure, one_of
    >>> scaled = Structure(lambda q, k: one_of(q @ k.mT * ANY, q @ k.mT / ANY))

    Args:
        *alternatives: Two or more expressions.

    Raises:
        SurgeryError: There are fewer than two alternatives.
    """
    if len(alternatives) < 2:
        raise _wrong("has a one_of with fewer than two alternatives", "write one_of(a, b)")
    return Expression("either", None, alternatives)


def maybe(value: Any) -> Any:
    """In a `Structure`: match an optional operation. Without the operation, its first operand matches.

    >>> import torch
    >>> from torch import fx
    >>> from surgery import Const, Structure, maybe
    >>> def attention(q, k, v, mask, scale=Const()):
    ...     scores = maybe(q @ k.mT * scale)
    ...     return torch.softmax(maybe(scores + mask), -1) @ v
    >>> graph = fx.symbolic_trace(lambda x, mask: torch.softmax(mask + x @ x.mT, -1) @ x)
    >>> Structure(attention).find(graph)[0].bindings
    {'q': x, 'k': x, 'v': x, 'mask': mask}

    Args:
        value: The operation.

    Note:
        Names that only the operation uses are bound only if it is present: use `bindings.get("scale")`.
    """
    first = value
    while isinstance(first, Expression) and first.kind in ("having", "either"):
        first = first.args[0]
    operand = first.args[0] if isinstance(first, Expression) and first.args else None
    if not isinstance(operand, Expression):
        raise _wrong("has a maybe of something that is not an operation", "write maybe(scores + mask)")
    return one_of(value, operand)


def Const(name: str | None = None, where: Callable[[Any], bool] | None = None) -> Any:
    """In a `Structure`: match a plain value in the code: a number, a string, None, a dtype, or a tuple of these.

    >>> import torch
    >>> from torch import fx
    >>> from surgery import Const, Structure
    >>> scaled = Structure(lambda x, scale=Const(): torch.softmax(x * scale, Const("dim")))
    >>> matches = scaled.find(fx.symbolic_trace(lambda x: torch.softmax(0.5 * x, dim=-1)))
    >>> matches[0].bindings
    {'x': x, 'scale': 0.5, 'dim': -1}

    Args:
        name: The name under which a match binds the value. Default: the parameter's name, if the Const is the default
            of a parameter, else unbound.
        where: A function of the value. Only values for which it is true match. Default None: all values match.

    Note:
        A number that each call computes from sizes is not a constant.
    """
    return Expression("const", name, (where,))


def module_of(kind: type[nn.Module] | str, *args: Any, subclasses: bool = False) -> Any:
    """In a `Structure`: match a call of a module of exactly this class.

    As the default of a parameter, it stands for the module itself: the pattern calls the parameter, and a match binds
    the module under the parameter's name.

    >>> from torch import nn
    >>> from surgery import Structure, module_of, trace
    >>> mlp = Structure(lambda x: module_of(nn.Linear, module_of("NewGELUActivation", module_of(nn.Linear, x))))
    >>> norm = Structure(lambda x: module_of(nn.Module, x, subclasses=True))
    >>> folded = Structure(lambda x, conv=module_of(nn.Conv2d), norm=module_of(nn.BatchNorm2d): norm(conv(x)))
    >>> folded.names
    ['x', 'conv', 'norm']

    Args:
        kind: The class or its name.
        *args: The arguments of the call. In the default of a parameter: none.
        subclasses: Whether subclasses match, too. They may compute something else: timm's `BatchNormAct2d` is a
            `BatchNorm2d` followed by an activation. Default False. If the graph has only a subclass, `Found.reason`
            says so.
    """
    return Expression("module", kind, args, {"subclasses": subclasses})


def having(value: Any, **attributes: Any) -> Any:
    """In a `Structure`: match a value whose node has these attributes.

    >>> import torch
    >>> from surgery import Structure, having
    >>> half = Structure(lambda x: having(torch.softmax(x, -1), dtype=torch.float16))

    Args:
        value: An operation.
        **attributes: Attributes of the node, as in `as_digraph`: `dtype`; `shape`, a tuple in which ANY matches any
            size; `type`, the module's class or its name (with `subclasses=True` also subclasses); `path`, the module's
            path, matched like a target; `op`; `target`.
    """
    return Expression("having", attributes, (value,))


def _wrong(problem: str, fix: str) -> SurgeryError:
    return SurgeryError(f"the structure {problem}", why="a structure is recorded once and never run", fix=fix)
