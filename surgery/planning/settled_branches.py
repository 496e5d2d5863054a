"""Evaluates the `if` tests of a forward that depend only on the module's present settings."""

from __future__ import annotations

import ast
import operator
from typing import Any

from torch import Tensor, nn

__all__ = ["Tests", "is_reachable"]

# The tests around a place in the source, and the value that each must have to reach the place.
Tests = tuple[tuple[ast.expr, bool], ...]


class _Undecided(Exception):
    """The value depends on the call, or on code that is not evaluated."""


def is_reachable(tests: Tests, name: str, module: nn.Module) -> bool:
    """Whether a call can reach a place behind these tests; `name` is the module's name in them."""
    for test, expected in tests:
        try:
            if bool(_constant(_value(test, name, module))) is not expected:
                return False
        except _Undecided:
            continue
    return True


def _value(node: ast.expr, name: str, module: nn.Module) -> Any:
    """The value of an expression. `_Undecided` if it depends on more than the module's settings."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=root) if root == name:
            return module
        case ast.Attribute(value=owner, attr=attribute):
            return _attribute(_value(owner, name, module), attribute)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _constant(_value(operand, name, module))
        case ast.BoolOp(op=kind, values=parts):
            return _any(parts, name, module, isinstance(kind, ast.Or))
        case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(attribute))]):
            return _has(_value(owner, name, module), attribute)
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(attribute)), default]):
            instance = _value(owner, name, module)
            return _attribute(instance, attribute) if _has(instance, attribute) else _value(default, name, module)
        case ast.Compare(left=left, ops=[kind], comparators=[right]) if type(kind) in _COMPARED:
            first, second = (_value(part, name, module) for part in (left, right))
            if isinstance(kind, (ast.Is, ast.IsNot)):
                return _COMPARED[type(kind)](first, second)
            return _COMPARED[type(kind)](_constant(first), _constant(second))
    raise _Undecided


def _any(parts: list[ast.expr], name: str, module: nn.Module, deciding: bool) -> bool:
    """The value of `or` (`deciding` True) or `and` (False): a part equal to `deciding` decides it."""
    unknown = False
    for part in parts:
        try:
            if bool(_constant(_value(part, name, module))) is deciding:
                return deciding
        except _Undecided:
            unknown = True
    if unknown:
        raise _Undecided
    return not deciding


def _attribute(owner: Any, name: str) -> Any:
    """The value of an attribute. `_Undecided` for the training flag, tensors' attributes and properties."""
    if name == "training" or isinstance(owner, Tensor):
        raise _Undecided
    if isinstance(owner, nn.Module):
        for attributes in (owner.__dict__, owner._modules, owner._parameters, owner._buffers):
            if name in attributes:
                return attributes[name]
        raise _Undecided  # a property is code
    if not hasattr(owner, "__dict__"):
        raise _Undecided
    try:
        return getattr(owner, name)
    except Exception:
        raise _Undecided from None


def _has(owner: Any, name: str) -> bool:
    if isinstance(owner, Tensor):
        raise _Undecided
    try:
        return hasattr(owner, name)
    except Exception:
        raise _Undecided from None


def _constant(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, type(None), list, tuple, dict)):
        return value
    raise _Undecided


_COMPARED: dict[type, Any] = {
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
