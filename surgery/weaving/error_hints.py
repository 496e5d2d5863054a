"""Hints for errors that a rewrite's operations raise during a call."""

from __future__ import annotations

import re

from torch import nn

from surgery.patterns.module_walk import RESERVED

__all__ = ["HINT", "hint_on"]

HINT = "hint: "


def hint_on(error: Exception, module: nn.Module) -> str | None:
    """Returns a hint for torch's errors about mixed dtypes or outputs that are not tensors, or None."""
    text = str(error)
    if isinstance(error, RuntimeError) and "dtype" in text:
        adapters = getattr(module, RESERVED, None)
        module_dtypes, adapter_dtypes = _dtypes(module, RESERVED), _dtypes(adapters) if adapters is not None else set()
        if adapter_dtypes - module_dtypes and module_dtypes:
            dtypes = " and ".join(sorted(str(dtype) for dtype in adapter_dtypes - module_dtypes))
            return (
                f"{HINT}the adapter's tensors are {dtypes}, the module's are not: bring one to the other, x.to(A.dtype)"
            )
    elif isinstance(error, TypeError) and re.search(r"\b(tuple|list|dict|\w*Output\w*)\b", text) and "Tensor" in text:
        return (
            f"{HINT}the output is not a tensor: site.hidden is the one in it, site.with_hidden(new) puts another there"
        )
    return None


def _dtypes(module: nn.Module, excluded: str = "") -> set:
    named = (*module.named_parameters(), *module.named_buffers())
    return {
        t.dtype for name, t in named if t.is_floating_point() and not (excluded and name.startswith(f"{excluded}."))
    }
