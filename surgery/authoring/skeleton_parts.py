"""The parts of a skeleton: each module's class, settings and wiring, from which a call builds a view of the module."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = [
    "OF_MODULES",
    "WIRING",
    "ModulePart",
    "assigned_names",
    "build_content",
    "fill_tensors",
    "named_tensors",
    "split_module",
]


class AttributeContent(NamedTuple):
    """The content of an attribute: a tensor by its word, a module by its number, or a container of these."""

    kind: str
    content: Any


class ModulePart(NamedTuple):
    """One module of a skeleton: its class, plain attributes, tensors, children, and attributes that a call builds."""

    cls: type[nn.Module]
    plain: dict[str, Any]
    parameters: tuple[tuple[str, str | None], ...]
    buffers: tuple[tuple[str, str | None], ...]
    children: tuple[tuple[str, int | None], ...]
    built: tuple[tuple[str, AttributeContent], ...]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's tensors by dotted names, each once: parameters, buffers, and tensors in plain attributes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ids = {id(tensor) for tensor in tensors.values()}
    for path, inner in module.named_modules():
        for name, value in inner.__dict__.items():
            if name in OF_MODULES:
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value) if _is_list(value) else ()
            places = [(name, value), *((f"{name}.{key}", item) for key, item in items)]
            for place, tensor in places:
                if isinstance(tensor, Tensor) and id(tensor) not in ids:
                    ids.add(id(tensor))
                    tensors[f"{path}.{place}" if path else place] = tensor
    return tensors


def fill_tensors(module: nn.Module, filled: Mapping[int, Tensor]) -> None:
    """Put other tensors in the places of those that `named_tensors` lists. `filled`: by the id of the present ones."""
    for _, inner in module.named_modules():
        tables: list[dict[str, Any]] = [inner._parameters, inner._buffers]
        for table in tables:
            table.update({name: filled[id(tensor)] for name, tensor in table.items() if id(tensor) in filled})
        for name, value in inner.__dict__.items():
            if name in OF_MODULES:
                continue
            if isinstance(value, dict):
                inner.__dict__[name] = {key: filled.get(id(item), item) for key, item in value.items()}
            elif _is_list(value):
                inner.__dict__[name] = type(value)(filled.get(id(item), item) for item in value)
            else:
                inner.__dict__[name] = filled.get(id(value), value)


def split_module(module: nn.Module, words: Mapping[str, str]) -> tuple[ModulePart, ...]:
    """Returns the parts of a skeleton's modules, the outermost last."""
    inside = [inner for _, inner in module.named_modules()][::-1]
    numbers = {id(inner): number for number, inner in enumerate(inside)}
    words_by_id = {id(tensor): words[name] for name, tensor in named_tensors(module).items()}
    parts = []
    for inner in inside:
        plain = {name: value for name, value in inner.__dict__.items() if name not in WIRING}
        contents = {
            name: _content(value, words_by_id, numbers) for name, value in plain.items() if name not in OF_MODULES
        }
        built = {name: content for name, content in contents.items() if content.kind != "plain"}
        parts.append(
            ModulePart(
                _view_class(type(inner), inner),
                {name: value for name, value in plain.items() if name not in built},
                tuple((name, None if t is None else words_by_id[id(t)]) for name, t in inner._parameters.items()),
                tuple((name, None if t is None else words_by_id[id(t)]) for name, t in inner._buffers.items()),
                tuple((name, None if c is None else numbers[id(c)]) for name, c in inner._modules.items()),
                tuple(built.items()),
            )
        )
    return tuple(parts)


def _content(value: Any, words_by_id: Mapping[int, str], numbers: Mapping[int, int]) -> AttributeContent:
    """The content of an attribute, as far as it has tensors or modules of the skeleton."""
    if isinstance(value, Tensor) and id(value) in words_by_id:
        return AttributeContent("tensor", words_by_id[id(value)])
    if isinstance(value, nn.Module) and id(value) in numbers:
        return AttributeContent("module", numbers[id(value)])
    if isinstance(value, types.MethodType) and id(value.__self__) in numbers:
        return AttributeContent("method", (value.__func__, numbers[id(value.__self__)]))
    if isinstance(value, weakref.ref) and id(value()) in words_by_id:
        return AttributeContent("reference", words_by_id[id(value())])
    for kind in ("list", "tuple", "dict"):
        if type(value).__name__ == kind and isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            contents = [_content(item, words_by_id, numbers) for item in items]
            if any(content.kind != "plain" for content in contents):
                return AttributeContent(kind, tuple(zip(value, contents, strict=True)))
    return AttributeContent("plain", value)


def build_content(attribute: AttributeContent, tensors: Mapping[str, Tensor], views: list[nn.Module]) -> Any:
    """Build an attribute of a view from a call's tensors and the views of the other modules."""
    kind, content = attribute
    if kind == "tensor":
        return tensors[content]
    if kind == "module":
        return views[content]
    if kind == "method":
        return types.MethodType(content[0], views[content[1]])
    if kind == "reference":
        return weakref.ref(tensors[content])
    if kind == "dict":
        return {key: build_content(inner, tensors, views) for key, inner in content}
    if kind == "plain":
        return content
    items = [build_content(inner, tensors, views) for _, inner in content]
    return tuple(items) if kind == "tuple" else items


def _view_class(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """Returns the class of a view. If the forward sets buffers, it is a subclass that simply stores them.

    nn.Module's own `__setattr__` inspects signatures, and torch.compile can't trace that on a view.
    """
    if not any(name in module._buffers for name in assigned_names(cls.forward)):
        return cls
    if cls not in _setters:

        def set_attribute(self: Any, name: str, value: Any) -> None:
            if name in self._buffers:
                self._buffers[name] = value
            else:
                cls.__setattr__(self, name, value)

        metaclass: Any = type(cls)
        _setters[cls] = metaclass(cls.__name__, (cls,), {"__setattr__": set_attribute, "__module__": cls.__module__})
    return _setters[cls]


def assigned_names(forward: Any) -> tuple[str, ...]:
    """Returns the attributes that a forward sets on its module."""
    if forward not in _assigned_names:
        _assigned_names[forward] = tuple(_find_assigned(forward))
    return _assigned_names[forward]


def _find_assigned(forward: Any) -> list[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        itself = next(iter(inspect.signature(forward).parameters))
    except (OSError, TypeError, SyntaxError, ValueError, StopIteration):
        return []
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return [node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == itself]


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


WIRING = frozenset({"_parameters", "_buffers", "_modules", "training"})  # attributes that each call sets on a view
OF_MODULES = frozenset(nn.Module().__dict__)  # attributes that nn.Module itself stores
_assigned_names: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
_setters: weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakKeyDictionary()
