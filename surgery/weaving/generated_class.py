"""Generates the class of a site from a woven graph. Undoing it restores the module's own class.

The generated class is a subclass of the module's own class with the same name. Its `forward` is source code written
from the graph. All sites with the same base and equal edits share it. Unpickling a module builds it from its source.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import itertools
import linecache
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer
from surgery.packed.packed_stack import attributes_of_sites
from surgery.sharded_tensors import refuse_split
from surgery.state.records import site_state
from surgery.weaving.class_objections import binds_forward
from surgery.weaving.deferred_class import DeferredRecipe, are_independent, deferred_forward, ensure_written
from surgery.weaving.error_hints import hint_on
from surgery.weaving.forward_source import graph_statements, signature_source
from surgery.weaving.late_quantisation import late_quantisation_error
from surgery.weaving.weave import weave

__all__ = ["BOUND", "Recipe", "class_from", "generated_class", "recipe_of", "swap_class", "explain_error"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """The parts of a generated class: its base, its source, and the objects that the source uses by name."""

    base: type[nn.Module]
    source: str
    names: dict[str, Any] = field(repr=False)
    label: str = ""

    def __deepcopy__(self, memo: dict) -> Recipe:
        return self

    def __reduce__(self):
        return _restore_recipe, (
            self.base,
            self.source,
            {name: _import_name(value) for name, value in self.names.items()},
            self.label,
        )


def generated_class(own: OwnForward, layers: Sequence[Layer]) -> type[nn.Module]:
    """Returns the class whose forward is the base's own with these layers' edits. Equal edits share the class."""
    key = (own.key, tuple(layers))
    cls = _classes.get(key)
    if cls is None:
        deferred = len(layers) > EAGER_LIMIT and are_independent({layer.tape for layer in layers})
        cls = _deferred_class(own, key[1]) if deferred else class_from(_write_recipe(own, layers))
        _classes[key] = cls
    return cls


def _deferred_class(own: OwnForward, layers: tuple[Layer, ...]) -> type[nn.Module]:
    """Returns a class that is written at its first call. Each layer alone is written now, to find errors early."""
    key = own.key
    for layer in [layer for layer in layers if key not in layer.tape.accepted_by]:
        class_from(_write_recipe(own, (layer,)))
    holder: list[type[nn.Module]] = []
    recipe = DeferredRecipe(lambda cls: _write(cls, own, layers))
    holder.append(_class_of(own.base, deferred_forward(own.signature, explain_error, holder), recipe))
    return holder[0]


def _write(cls: type[nn.Module], own: OwnForward, layers: tuple[Layer, ...]) -> None:
    recipe = _write_recipe(own, layers)
    cls._surgery_generated_forward, filename = _compile_forward(recipe)  # type: ignore[assignment]
    cls._surgery_recipe = recipe  # type: ignore[assignment]
    weakref.finalize(cls, linecache.cache.pop, filename, None)


def recipe_of(cls: type[nn.Module]) -> Recipe | None:
    """Returns the recipe of a generated class, or None for other classes."""
    return vars(ensure_written(cls)).get("_surgery_recipe")


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set a module's class, and bind the new class's forward where the instance stores a bound forward."""
    before = type(module)
    _set_class(module, "__class__", cls)
    for name in BOUND & module.__dict__.keys():
        if binds_forward(module.__dict__[name], module, before):
            module.__dict__[name] = types.MethodType(cls.forward, module)


# Writing the source -----------------------------------------------------------------------------------------


def _write_recipe(own: OwnForward, layers: Sequence[Layer]) -> Recipe:
    same_in_both_modes = own.tapes is None or own.tapes[0] is own.tapes[1]
    same_in_both_modes = same_in_both_modes and not any(layer.tape.by_mode for layer in layers)
    bodies, names = [], {}
    for training in (False,) if same_in_both_modes else (False, True):
        lines, new_names = graph_statements(weave(own, layers, training))
        bodies.append(lines)
        names.update(new_names)
    signature, defaults = signature_source(own.signature)
    names.update(defaults, _surgery_explain_error=explain_error)
    lines = [f"def forward({signature}):", "    try:"]
    if same_in_both_modes or bodies[0] == bodies[1]:
        lines += ["        " + line for line in bodies[0]]
    else:
        lines += ["        if self.training:", *("            " + line for line in bodies[1])]
        lines += ["        else:", *("            " + line for line in bodies[0])]
    lines += ["    except Exception as error:", "        raise _surgery_explain_error(error, self)"]
    label = f"{own.base.__name__} + " + ", ".join(f"{layer.label} [{layer.adapter}]" for layer in layers)
    for layer in layers:
        layer.tape.accepted_by.add(own.key)
    return Recipe(own.base, "\n".join(lines) + "\n", names, label)


# Making the class -------------------------------------------------------------------------------------------


def class_from(recipe: Recipe) -> type[nn.Module]:
    """Returns the class of a recipe. Equal sources share the class."""
    # Equal sources use equal objects under their names, except module skeletons (`surgery.authoring.module_skeleton`).
    skeletons = [value for value in recipe.names.values() if getattr(value, "keeps_dtype", False)]
    key = (recipe.base, recipe.source, *skeletons)
    known = _by_source.get(key)
    if known is not None:
        return known
    forward, filename = _compile_forward(recipe)
    cls = _by_source[key] = _class_of(recipe.base, forward, recipe)
    weakref.finalize(cls, linecache.cache.pop, filename, None)
    return cls


def _class_of(base: type[nn.Module], forward: Callable[..., Any], recipe: Recipe | DeferredRecipe) -> type[nn.Module]:
    metaclass: Any = type(base)
    names = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__init__": _plain_init(base),
        "__reduce_ex__": _reduce_ex,
        "register_parameter": _register_parameter,
        "_surgery_base": base,
        "_surgery_recipe": recipe,
        "_surgery_self": property(lambda self: self),
        **attributes_of_sites(base),
    }
    return metaclass(base.__name__, (base,), names)


def _plain_init(base: type[nn.Module]) -> Callable[..., None]:
    """Returns the `__init__` of a generated class. A module that it makes is a plain one.

    `type(module)(…)`, as in a slice of a Sequential, does not copy the rules of the module.
    """

    @functools.wraps(base.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_surgery_site" not in self.__dict__:
            _set_class(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    return init


def _compile_forward(recipe: Recipe) -> tuple[Callable[..., Any], str]:
    """Compile a recipe's source. Returns the forward, and the file name that tracebacks show."""
    filename = f"<surgery {next(_numbers)}: {recipe.label}>"
    namespace = dict(recipe.names)
    exec(compile(recipe.source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(recipe.source), None, recipe.source.splitlines(True), filename)
    forward, base = namespace["forward"], recipe.base
    forward.__module__, forward.__qualname__ = base.__module__, f"{base.__qualname__}.forward"
    forward.__doc__ = base.forward.__doc__
    return forward, filename


def explain_error(error: Exception, module: nn.Module) -> Exception:
    """Add a note with the site and its rules to an error of a call. Returns the error, or a clearer error."""
    state = site_state(module)
    if state is not None:
        if (explanation := late_quantisation_error(module, state, error)) is not None:
            explanation.__cause__ = error
            return explanation
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
    """Pickles a module of a generated class: the recipe takes the place of the class."""
    cls = type(self)
    recipe = recipe_of(cls)
    reduced = self._surgery_base.__reduce_ex__(self, protocol)  # type: ignore[union-attr, arg-type, operator]
    if recipe is None or not isinstance(reduced, tuple):
        return reduced
    function, args, *rest = reduced
    if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
        return (revive, (recipe, *args[1:]), *rest)
    if function is copyreg._reconstructor and args[0] is cls:  # type: ignore[attr-defined]
        return (revive, (recipe,), *rest)
    return reduced


def revive(recipe: Recipe, *args: Any) -> nn.Module:
    cls = class_from(recipe)
    return cls.__new__(cls, *args)


def _restore_recipe(base: type[nn.Module], source: str, names: dict[str, Any], label: str) -> Recipe:
    return Recipe(
        base,
        source,
        {name: value() if isinstance(value, _ImportedName) else value for name, value in names.items()},
        label,
    )


@dataclass(frozen=True)
class _ImportedName:
    """The import name of a module, function or class. A call imports it."""

    module: str
    attribute: str = ""

    def __call__(self) -> Any:
        target = importlib.import_module(self.module)
        for part in filter(None, self.attribute.split(".")):
            target = getattr(target, part)
        return target


def _import_name(value: Any) -> Any:
    """Returns the import name of a module, function or class. Other values are returned as they are."""
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


EAGER_LIMIT = 8  # a site with more live rules gets its forward written at its first call
BOUND = frozenset({"forward", "_old_forward"})
_set_class = object.__setattr__  # nn.Module's own takes twenty times as long, because it looks for tensors first
_numbers = itertools.count(1)
_classes: weakref.WeakValueDictionary[tuple, type[nn.Module]] = weakref.WeakValueDictionary()
_by_source: weakref.WeakValueDictionary[tuple, type[nn.Module]] = weakref.WeakValueDictionary()
