"""Reads the arguments of a call as Python values while torch.compile traces the call.

Dynamo's `comptime` runs a function during tracing and passes Dynamo's variables for the locals. Tensors are fake.
An object that the compiled code created or changed is rebuilt from Dynamo's list of side effects.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

__all__ = ["UnknownLocal", "call_of", "is_first", "restart"]


class UnknownLocal(Exception):
    """Dynamo holds a local in a form that this module can't read."""


def call_of(context: Any) -> tuple[nn.Module, tuple]:
    """Returns the locals `module` and `arguments` of the traced code. Raises `UnknownLocal`."""
    try:
        values = _Values(context)
        return values.of("module"), values.of("arguments")
    except UnknownLocal:
        raise
    except Exception as error:  # Dynamo's classes are private and change from version to version
        raise UnknownLocal(f"{type(error).__name__}: {error}") from error


def is_first(context: Any, module: nn.Module) -> bool:
    """Whether Dynamo reaches this module for the first time in its present attempt at a frame; notes the visit."""
    visited: set[int] = vars(_translator(context).output).setdefault("_surgery_visited", set())
    first = id(module) not in visited
    visited.add(id(module))
    return first


def restart(reason: str) -> None:
    """Make Dynamo trace the present frame again, because a site has changed and may have other code."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    raise UnspecializeRestartAnalysis(restart_reason=reason)


def _translator(context: Any) -> Any:
    return context._i_will_not_complain_if_bc_breaks_InstructionTranslator()


class _Values:
    """Converts Dynamo's variables to Python values."""

    def __init__(self, context: Any):
        self.context = context
        self.effects = _translator(context).output.side_effects
        self.converted: dict[int, Any] = {}  # id of a variable → its value

    def of(self, name: str) -> Any:
        return self.value(self.context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker())

    def value(self, variable: Any) -> Any:
        variable = variable.realize()
        if id(variable) in self.converted:
            return self.converted[id(variable)]
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
        """Returns a copy of an object with the attributes that the compiled code has set so far."""
        clone = self.converted[id(variable)] = copy.copy(real)
        if not hasattr(clone, "__dict__"):
            return clone
        for name, part in vars(real).items():
            clone.__dict__[name] = self.present(part)
        for name, attribute in self.effects.store_attr_mutations.get(variable, {}).items():
            clone.__dict__[name] = self.value(attribute)
        return clone

    def present(self, part: Any) -> Any:
        """Returns the present value of a part of an object."""
        if id(part) in self.effects.id_to_variable:
            return self.value(self.effects.id_to_variable[id(part)])
        if isinstance(part, (Tensor, nn.Module)):
            return part
        if type(part) in (list, tuple):
            return type(part)(self.present(item) for item in part)
        if type(part) is dict:
            return {key: self.present(item) for key, item in part.items()}
        return part
