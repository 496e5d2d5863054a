"""What is probably wrong in a rewrite whose own operations fail at a call."""

from __future__ import annotations

import re

from torch import nn

from surgery.patterns.module_walk import RESERVED

__all__ = ["HINT", "hint_on"]

HINT = "hint: "


def hint_on(error: Exception, module: nn.Module) -> str | None:
    """A line for torch's errors on mixed dtypes and on outputs that are not tensors, where the site explains them."""
    text = str(error)
    if isinstance(error, RuntimeError) and "dtype" in text:
        adapters = getattr(module, RESERVED, None)
        own, other = _dtypes(module, RESERVED), _dtypes(adapters) if adapters is not None else set()
        if other - own and own:
            told = " and ".join(sorted(str(dtype) for dtype in other - own))
            return (
                f"{HINT}the adapter's tensors are {told}, the module's are not: bring one to the other, x.to(A.dtype)"
            )
    elif isinstance(error, TypeError) and re.search(r"\b(tuple|list|dict|\w*Output\w*)\b", text) and "Tensor" in text:
        return (
            f"{HINT}the output is not a tensor: site.hidden is the one in it, site.with_hidden(new) puts another there"
        )
    return None


def _dtypes(module: nn.Module, apart: str = "") -> set:
    named = (*module.named_parameters(), *module.named_buffers())
    return {t.dtype for name, t in named if t.is_floating_point() and not (apart and name.startswith(f"{apart}."))}
