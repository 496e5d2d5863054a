"""Says which children a trace can look into: those whose call is nothing but their forward."""

from __future__ import annotations

from torch import nn

__all__ = ["HOOKS", "call_objection", "inlining_objection"]

# The hooks that a call of a module runs besides its forward.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def inlining_objection(module: nn.Module) -> str | None:
    """Returns why a call of a module is more than its own forward, or None."""
    if (why := call_objection(module)) is not None:
        return why
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__ or getattr(module, "_compiled_call_impl", None) is not None:
        return f"a call of a {kind.__name__} does more than its forward"
    return None


def call_objection(module: nn.Module) -> str | None:
    """Returns what somebody has added to this module's call, or None."""
    if hasattr(module, "_surgery_base"):
        return "it has rules of its own"
    if "forward" in module.__dict__:
        return "a forward was set on the instance"
    hooks = [name for name in HOOKS if module.__dict__.get(name)]
    return f"it has {hooks[0].strip('_').replace('_', ' ')}, which only a call of it runs" if hooks else None
