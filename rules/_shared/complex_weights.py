"""Why methods refuse modules with complex parameters."""

from __future__ import annotations

import torch
from torch import nn

from surgery import Rule

_DROPPING = ("dropout", "rank_dropout", "module_dropout")


def why_not(rule: Rule, module: nn.Module, real: str = "") -> str | None:
    """Returns why a rule can't take a module with complex parameters, or None. `real`: its operation for real numbers.

    On modules that it takes, its tensors are complex, as in PEFT.
    """
    dtype = next((p.dtype for p in module._parameters.values() if p is not None and p.is_complex()), None)
    if dtype is None:
        return None
    of = f"its parameters are {str(dtype).removeprefix('torch.')}, and"
    if isinstance(module, nn.Embedding):
        return f"{of} torch has no gradients for an Embedding of complex numbers"
    if real:
        return f"{of} {real}"
    for name in _DROPPING:
        if getattr(rule, name, 0.0):
            return f"{of} torch has no dropout for complex numbers; give it a rule with {name}=0"
    own = getattr(rule, "dtype", None)
    if own is not None and not getattr(torch, str(own)).is_complex:
        return f"{of} tensors in dtype={own!r} would drop the imaginary part of its input"
    return None
