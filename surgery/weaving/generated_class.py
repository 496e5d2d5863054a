"""A graph becomes a class, and the class is given to the module. The way back is the module's own class.

The generated class is a subclass of the module's own, of the same name, whose `forward` is the source written from
the woven graph. It is shared by all sites whose base and edits are equal, and rebuilt from its source when a module
is unpickled.
"""

from __future__ import annotations

import copyreg
import importlib
import itertools
import linecache
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer
from surgery.sharded_tensors import refuse_split
from surgery.state.records import site_state
from surgery.weaving.class_objections import binds_forward
from surgery.weaving.deferred_class import Unwritten, independent, settled, writing_forward
from surgery.weaving.error_hints import hint_on
from surgery.weaving.forward_source import body_of, signature_source
from surgery.weaving.quantised_later import quantised_later
from surgery.weaving.weave import woven

__all__ = ["BOUND", "Recipe", "class_from", "generated_class", "recipe_of", "swap", "told"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a generated class is made of: its base, its source, and the names the source uses."""

    base: type[nn.Module]
    source: str
    names: dict[str, Any] = field(repr=False)
    label: str = ""

    def __deepcopy__(self, memo: dict) -> Recipe:
        return self

    def __reduce__(self):
        return _recipe, (
            self.base,
            self.source,
            {name: _by_name(value) for name, value in self.names.items()},
            self.label,
        )


def generated_class(own: OwnForward, layers: Sequence[Layer]) -> type[nn.Module]:
    """The class whose forward is the base's own with these layers' edits; the same class for equal ones."""
    key = (own.key, tuple(layers))
    found = _classes.get(key)
    if found is None:
        later = len(layers) > AT_ONCE and independent({layer.tape for layer in layers})
        found = _class_later(own, key[1]) if later else class_from(_written(own, layers))
        _classes[key] = found
    return found


def _class_later(own: OwnForward, layers: tuple[Layer, ...]) -> type[nn.Module]:
    """A class that is written at its first call; that each of its layers can be written is tried now."""
    key = own.key
    for layer in [layer for layer in layers if key not in layer.tape.accepted_by]:
        class_from(_written(own, (layer,)))
    of: list[type[nn.Module]] = []
    recipe = Unwritten(lambda cls: _write(cls, own, layers))
    of.append(_class_of(own.base, writing_forward(own.signature, told, of), recipe))
    return of[0]


def _write(cls: type[nn.Module], own: OwnForward, layers: tuple[Layer, ...]) -> None:
    recipe = _written(own, layers)
    cls._surgery_written, filename = _forward_of(recipe)  # type: ignore[assignment]
    cls._surgery_recipe = recipe  # type: ignore[assignment]
    weakref.finalize(cls, linecache.cache.pop, filename, None)


def recipe_of(cls: type[nn.Module]) -> Recipe | None:
    """What a generated class is made of; None for any other."""
    return vars(settled(cls)).get("_surgery_recipe")


def swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, and let forwards bound on the instance follow."""
    before = type(module)
    _set_class(module, "__class__", cls)
    for name in BOUND & module.__dict__.keys():
        if binds_forward(module.__dict__[name], module, before):
            module.__dict__[name] = types.MethodType(cls.forward, module)


# Writing the source -----------------------------------------------------------------------------------------


def _written(own: OwnForward, layers: Sequence[Layer]) -> Recipe:
    alike = own.tapes is None or own.tapes[0] is own.tapes[1]
    alike = alike and not any(layer.tape.by_mode for layer in layers)
    bodies, names = [], {}
    for training in (False,) if alike else (False, True):
        lines, found = body_of(woven(own, layers, training))
        bodies.append(lines)
        names.update(found)
    signature, defaults = signature_source(own.signature)
    names.update(defaults, _surgery_told=told)
    lines = [f"def forward({signature}):", "    try:"]
    if alike or bodies[0] == bodies[1]:
        lines += ["        " + line for line in bodies[0]]
    else:
        lines += ["        if self.training:", *("            " + line for line in bodies[1])]
        lines += ["        else:", *("            " + line for line in bodies[0])]
    lines += ["    except Exception as error:", "        raise _surgery_told(error, self)"]
    label = f"{own.base.__name__} + " + ", ".join(f"{layer.label} [{layer.adapter}]" for layer in layers)
    for layer in layers:
        layer.tape.accepted_by.add(own.key)
    return Recipe(own.base, "\n".join(lines) + "\n", names, label)


# Making the class -------------------------------------------------------------------------------------------


def class_from(recipe: Recipe) -> type[nn.Module]:
    # What the names of a source mean is known by them, but for modules that stand in it
    # (`surgery.authoring.module_skeleton`).
    skeletons = [value for value in recipe.names.values() if getattr(value, "keeps_dtype", False)]
    key = (recipe.base, recipe.source, *skeletons)
    found = _by_source.get(key)
    if found is not None:
        return found
    forward, filename = _forward_of(recipe)
    cls = _by_source[key] = _class_of(recipe.base, forward, recipe)
    weakref.finalize(cls, linecache.cache.pop, filename, None)
    return cls


def _class_of(base: type[nn.Module], forward: Any, recipe: Recipe | Unwritten) -> type[nn.Module]:
    metaclass: Any = type(base)
    names = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "register_parameter": _register_parameter,
        "_surgery_base": base,
        "_surgery_recipe": recipe,
        "_surgery_self": property(lambda self: self),
    }
    return metaclass(base.__name__, (base,), names)


def _forward_of(recipe: Recipe) -> tuple[Any, str]:
    """The forward of a source, and the name under which its lines are known."""
    filename = f"<surgery {next(_numbers)}: {recipe.label}>"
    space = dict(recipe.names)
    exec(compile(recipe.source, filename, "exec"), space)
    linecache.cache[filename] = (len(recipe.source), None, recipe.source.splitlines(True), filename)
    forward, base = space["forward"], recipe.base
    forward.__module__, forward.__qualname__ = base.__module__, f"{base.__qualname__}.forward"
    forward.__doc__ = base.forward.__doc__
    return forward, filename


def told(error: Exception, module: nn.Module) -> Exception:
    """The error, with a note that says at which site and under which rules it came up."""
    state = site_state(module)
    if state is not None:
        if (meant := quantised_later(module, state, error)) is not None:
            meant.__cause__ = error
            return meant
        hint = None if getattr(error, "__notes__", []) else hint_on(error, module)
        rules = ", ".join(f"{applied.rule.label} [{applied.adapter}]" for applied in state.applied)
        error.add_note(
            f"at the site {state.path or '(the model itself)'}, a {type(module).__name__} rewritten by {rules}"
        )
        if hint:
            error.add_note(hint)
    return error


def _register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
    refuse_split(self, name, param)
    type(self)._surgery_base.register_parameter(self, name, param)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    cls = type(self)
    recipe = recipe_of(cls)
    made = self._surgery_base.__reduce_ex__(self, protocol)  # type: ignore[union-attr, arg-type, operator]
    if recipe is None or not isinstance(made, tuple):
        return made
    function, args, *rest = made
    if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
        return (revived, (recipe, *args[1:]), *rest)
    if function is copyreg._reconstructor and args[0] is cls:  # type: ignore[attr-defined]
        return (revived, (recipe,), *rest)
    return made


def revived(recipe: Recipe, *args: Any) -> nn.Module:
    cls = class_from(recipe)
    return cls.__new__(cls, *args)


def _recipe(base: type[nn.Module], source: str, names: dict[str, Any], label: str) -> Recipe:
    return Recipe(
        base,
        source,
        {name: value() if isinstance(value, _ImportedName) else value for name, value in names.items()},
        label,
    )


@dataclass(frozen=True)
class _ImportedName:
    """A module, function or class by the name it is imported under."""

    module: str
    attribute: str = ""

    def __call__(self) -> Any:
        found = importlib.import_module(self.module)
        for part in filter(None, self.attribute.split(".")):
            found = getattr(found, part)
        return found


def _by_name(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return _ImportedName(value.__name__)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    if not isinstance(name, str):
        return value
    for candidate in (
        _ImportedName(module or "builtins", name),
        _ImportedName("torch._C._nn", name),
        _ImportedName("torch", name),
    ):
        try:
            if candidate() is value:
                return candidate
        except (ImportError, AttributeError, ValueError):
            continue
    return value


AT_ONCE = 8  # rules on one site whose forward is written as soon as they are there
BOUND = frozenset({"forward", "_old_forward"})
_set_class = object.__setattr__  # nn.Module's own looks for tensors first, and takes twenty times as long
_numbers = itertools.count(1)
_classes: weakref.WeakValueDictionary[tuple, type[nn.Module]] = weakref.WeakValueDictionary()
_by_source: weakref.WeakValueDictionary[tuple, type[nn.Module]] = weakref.WeakValueDictionary()
