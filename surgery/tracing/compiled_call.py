"""What torch.compile knows of a call while it goes through the code of one: its arguments as Python values.

Dynamo's `comptime` runs a function in the midst of that, and gives it the locals as Dynamo has them. Tensors come as
fake ones. An object may be one that the compiled code itself made or wrote to; it is put together from Dynamo's notes.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

__all__ = ["UnknownLocal", "call_of", "is_first", "restart"]


class UnknownLocal(Exception):
    """Dynamo has a local in a form that is not known here."""


def call_of(context: Any) -> tuple[nn.Module, tuple]:
    """The module and its arguments, which the code at hand calls `module` and `given`. Raises `Unknown`."""
    try:
        values = _Values(context)
        return values.of("module"), values.of("given")
    except UnknownLocal:
        raise
    except Exception as error:  # these are Dynamo's own classes, which change from version to version
        raise UnknownLocal(f"{type(error).__name__}: {error}") from error


def is_first(context: Any, module: nn.Module) -> bool:
    """Whether Dynamo comes to this module for the first time in this attempt at a frame. It notes that it came."""
    seen: set[int] = vars(_translator(context).output).setdefault("_surgery_seen", set())
    first = id(module) not in seen
    seen.add(id(module))
    return first


def restart(reason: str) -> None:
    """Dynamo begins the frame at hand once more, and may come through other code: a site has changed."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    raise UnspecializeRestartAnalysis(restart_reason=reason)


def _translator(context: Any) -> Any:
    return context._i_will_not_complain_if_bc_breaks_InstructionTranslator()


class _Values:
    """Python values of Dynamo's variables."""

    def __init__(self, context: Any):
        self.context = context
        self.effects = _translator(context).output.side_effects
        self.known: dict[int, Any] = {}

    def of(self, name: str) -> Any:
        return self.value(self.context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker())

    def value(self, variable: Any) -> Any:
        variable = variable.realize()
        if id(variable) in self.known:
            return self.known[id(variable)]
        kind = type(variable).__name__
        if variable.is_python_constant():
            return variable.as_python_constant()
        if kind == "SymNodeVariable":
            return variable.sym_num
        if variable.is_tensor():
            return variable.as_proxy().node.meta["example_value"]
        if kind in ("ListVariable", "TupleVariable", "SizeVariable"):
            return variable.python_type()(self.value(item) for item in variable.items)
        if kind == "ConstDictVariable":
            return {self.value(key.vt): self.value(item) for key, item in variable.items.items()}
        if getattr(variable, "_base_vt", None) is not None:
            raise UnknownLocal(f"a {variable.python_type().__name__}, which is a container of its own")
        real = getattr(variable, "value", None)
        if isinstance(real, nn.Module):
            return real
        if real is None:
            raise UnknownLocal(f"a {kind}")
        return self.object_of(variable, real)

    def object_of(self, variable: Any, real: Any) -> Any:
        """An object with what the compiled code has written to it so far."""
        made = self.known[id(variable)] = copy.copy(real)
        if not hasattr(made, "__dict__"):
            return made
        for name, part in vars(real).items():
            made.__dict__[name] = self.present(part)
        for name, written in self.effects.store_attr_mutations.get(variable, {}).items():
            made.__dict__[name] = self.value(written)
        return made

    def present(self, part: Any) -> Any:
        """A real part of an object, as it is by now."""
        if id(part) in self.effects.id_to_variable:
            return self.value(self.effects.id_to_variable[id(part)])
        if isinstance(part, (Tensor, nn.Module)):
            return part
        if type(part) in (list, tuple):
            return type(part)(self.present(item) for item in part)
        if type(part) is dict:
            return {key: self.present(item) for key, item in part.items()}
        return part
