"""Detects operations with side effects: they write to a tensor, register a hook, or draw random numbers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["draws", "has_effect", "is_foreign", "writes"]


def has_effect(op: str, target: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether an operation writes to a tensor, registers a hook or draws random numbers.

    `op` and `target` are those of a torch.fx node. Arguments may be nodes, terms or values; only plain values are read.

    >>> import torch
    >>> has_effect("call_method", "add_"), has_effect("call_method", "add")
    (True, False)
    >>> relu, rand = torch.nn.functional.relu, torch.rand
    >>> has_effect("call_function", relu, ("x", True)), has_effect("call_function", rand, (3,))
    (True, True)
    """
    return writes(op, target, args, kwargs) or draws(op, target, args, kwargs)


def writes(op: str, target: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether an operation writes to one of its operands in place, or registers a hook on it."""
    if op not in ("call_method", "call_function"):
        return False
    name = _name(target)
    if name in _WRITES or name.endswith("_") and not name.endswith("__"):
        return True
    if kwargs and kwargs.get("out") is not None:
        return True
    if name in _STATISTICS:
        mean = args[1] if len(args) > 1 else (kwargs or {}).get("running_mean")
        return mean is not None and _argument(target, "training", args, kwargs) is not False
    return op == "call_function" and _argument(target, "inplace", args, kwargs) not in (False, None)


def draws(op: str, target: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether an operation draws random numbers, at least while training."""
    if op not in ("call_method", "call_function"):
        return False
    name = _name(target)
    if name == "scaled_dot_product_attention":
        dropped = args[4] if len(args) > 4 else (kwargs or {}).get("dropout_p", 0.0)
        return not isinstance(dropped, (int, float)) or dropped > 0
    return name in _DRAWS or "dropout" in name


def is_foreign(op: str, target: Any) -> bool:
    """Whether an operation calls code outside torch and the engine, whose side effects are unknown."""
    if op == "call_method":
        return not hasattr(Tensor, target) and target not in _READS
    if op != "call_function":
        return False
    module = str(getattr(target, "__module__", None) or "torch")
    return module.partition(".")[0] not in _KNOWN


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _argument(target: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Returns the argument for a parameter of a Python function; None if it does not have this parameter."""
    index, default = _parameter(target, name)
    if index < 0:
        return None
    return args[index] if len(args) > index else (kwargs or {}).get(name, default)


@functools.cache
def _parameter(target: Any, name: str) -> tuple[int, Any]:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return -1, None
    return (list(parameters).index(name), parameters[name].default) if name in parameters else (-1, None)


_WRITES = frozenset({"setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand",
                     "ior", "ixor", "ilshift", "irshift", "imatmul", "setattr", "register_hook", "retain_grad",
                     "register_post_accumulate_grad_hook", "backward", "__setitem__"})  # fmt: skip
_KNOWN = frozenset({"torch", "_operator", "operator", "builtins", "math", "surgery", "rules", "einops"})
_READS = frozenset({"get", "keys", "values", "items", "to_tuple"})
_STATISTICS = frozenset({"batch_norm", "instance_norm"})
_DRAWING = ("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli",
            "multinomial", "poisson", "gumbel_softmax", "rrelu", "uniform", "exponential", "geometric", "log_normal",
            "cauchy", "random", "fractional_max_pool2d", "fractional_max_pool3d")  # fmt: skip
_DRAWS = frozenset(name + end for name in _DRAWING for end in ("", "_"))  # compilers can't strip names while tracing
