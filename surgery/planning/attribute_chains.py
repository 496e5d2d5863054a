"""Chains of attributes: the values of a function's names, as paths that begin at its arguments or at functions."""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

__all__ = [
    "CALL",
    "NO_CHAINS",
    "WRAP",
    "Chain",
    "Chains",
    "attribute_of",
    "closure_values",
    "global_value",
    "item_of",
    "union",
    "without_lines",
    "wrapped",
]

CALL, WRAP = "()", "~"  # steps of a chain that are not attributes: a call's result; an element of a new tuple
Step = tuple[Any, int]  # an attribute's name, CALL, WRAP, ("[]", key), or (class, name) for super().name; and its line
Chain = tuple[Any, tuple[Step, ...]]  # begins at an argument's name, or at a function
Chains = frozenset[Chain]
NO_CHAINS: Chains = frozenset()

# Attributes of a tensor that do not depend on its values.
_ABOUT = set(
    "dtype device shape ndim size dim numel nelement element_size stride is_contiguous requires_grad requires_grad_"
    " grad data_ptr is_meta is_cuda is_cpu layout is_sparse is_quantized is_nested itemsize nbytes get_device"
    " is_floating_point is_complex new_zeros new_ones new_empty new_full new_tensor storage untyped_storage".split()
)


def without_lines(chain: Chain) -> tuple:
    """A chain as a tuple that is equal for all places in the source."""
    return (chain[0], *(step for step, _ in chain[1]))


def union(value: Chains | list) -> Chains:
    """All chains in a set of chains, or in nested lists of such sets."""
    return frozenset().union(*map(union, value)) if isinstance(value, list) else value


def wrapped(chains: Chains) -> Chains:
    """The chains of a new tuple or list whose elements have these chains."""
    return frozenset((root, (*steps, (WRAP, 0))) for root, steps in chains)


def item_of(chains: Chains, key: Any = None, line: int = 0) -> Chains:
    """The chains of an element; `key` is None if the source does not show it."""
    unwrapped = {(r, s[:-1]) for r, s in chains if s and s[-1][0] == WRAP}
    return frozenset(unwrapped | {(r, (*s, (("[]", key), line))) for r, s in chains if not s or s[-1][0] != WRAP})


def attribute_of(chains: Chains, name: str, line: int) -> Chains:
    """The chains of an attribute; none for attributes that do not depend on a tensor's values."""
    result = set()
    for root, steps in chains:
        last = steps[-1][0] if steps else None
        if isinstance(last, type):
            result.add((root, (*steps[:-1], ((last, name), line))))
        elif isinstance(root, (ModuleType, type)):
            result |= global_value(vars(root).get(name))
        elif last != WRAP and name not in _ABOUT:
            result.add((root, (*steps, (name, line))))
    return frozenset(result)


def global_value(value: Any) -> Chains:
    """The chain of a function, module or class that a global name holds; none for other values."""
    value = value.__func__ if isinstance(value, staticmethod) else value
    return frozenset([(value, ())]) if isinstance(value, (FunctionType, ModuleType, type)) else NO_CHAINS


def closure_values(function: FunctionType) -> dict[str, Any]:
    """The values of a function's free variables by name."""
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # the name is bound later
            pass
    return cells
