"""`Skeleton`: a module without its numbers (class, settings and wiring), called with the tensors of each call.

A rule that inserts another module into a forward (`Site.submodule`, `rules.ReplaceRule`) stores the module's tensors
with the adapter, like all its tensors. The rest of the module is a `Skeleton`: one function on the tape. Its call
creates views of the module and its children with the adapter's tensors, and calls the outermost view. So the forward
may branch, unpack and loop, and torch.compile and torch.export see the operations of an ordinary call. A call never
writes to the skeleton, so threads and copies share it.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.errors import RuleError, SiteError
from surgery.transaction.gradient_flags import lazy_in

__all__ = ["Skeleton", "named_tensors"]


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


class Skeleton:
    """A module on the meta device with the names of its tensors. Equal modules share a skeleton.

    `words` maps the adapter's name of a tensor to its name in the module; a tensor in several places has one name.
    `module` is never called. A skeleton is pickled as its module on the meta device.
    """

    keeps_dtype = True  # the result has the dtype of the first input: see `__call__`

    def __init__(self, module: nn.Module):
        tensors = named_tensors(module)
        self.module, self.words = module, _words(tensors)
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = __name__
        self.parts = _parts(module, {name: word for word, name in self.words.items()})
        parameters = inspect.signature(type(module).forward).parameters.values()
        starred = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.takes = None if starred else frozenset(parameter.name for parameter in parameters)
        self.contents = [{name: _item_ids(value) for name, value in part.plain.items()} for part in self.parts]
        self.floating = next((word for word, name in self.words.items() if tensors[name].is_floating_point()), None)

    @staticmethod
    def of(module: nn.Module) -> Skeleton:
        """Returns the skeleton of a module. It reads only the shapes and dtypes of tensors, not their numbers."""
        skeleton = Skeleton(_hollow(module))
        key = skeleton._key()
        return skeleton if key is None else _known.setdefault(key, skeleton)

    def _key(self) -> tuple | None:
        """Returns a key that equal skeletons share; None if an attribute can't be compared."""
        tensors = named_tensors(self.module)
        signature = [
            (word, type(t := tensors[name]), tuple(t.shape), t.dtype, t.requires_grad)
            for word, name in self.words.items()
        ]
        key: list[Any] = [tuple(signature)]
        for part in self.parts:
            plain = []
            for name, value in part.plain.items():
                value = tuple(value) if isinstance(value, list) else value
                if name in _OF_MODULES:
                    if name.endswith("_hooks") and value:
                        return None
                elif not isinstance(value, _SIMPLE):
                    return None
                else:
                    plain.append((name, type(value), repr(value) if isinstance(value, float) else None, value))
            key.append((part.cls, tuple(plain), *part[2:]))
        result = tuple(key)
        try:
            hash(result)
        except TypeError:
            return None
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    def __reduce__(self) -> Any:
        return Skeleton.of, (self.module,)

    def __repr__(self) -> str:
        return self.__name__

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        training: bool,
        args: tuple,
        kwargs: dict[str, Any],
        more: tuple = (),
        extra: tuple[Mapping[str, Any], ...] = (),
        like: Tensor | None = None,
    ) -> Any:
        """Call the module with these tensors.

        It computes in the dtype of its tensors: floating inputs are cast to it, and the result is cast back to the
        dtype of the first floating input, or of `like` without such an input. `more` has further positional arguments.
        `extra` has mappings of further keyword arguments: None and names that the forward does not take are dropped.
        """
        args = (*args, *more)
        for further in extra:
            taken = {name: value for name, value in further.items() if value is not None and self._takes(name)}
            kwargs = {**taken, **kwargs}
        outer: torch.dtype | None = None
        if self.floating is not None:
            inner = tensors[self.floating].dtype
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            leaves = [leaf for leaf in leaves if leaf.is_floating_point()]
            first = leaves[0] if leaves else like
            outer = first.dtype if first is not None and first.dtype != inner else None
            if any([leaf.dtype != inner for leaf in leaves]):
                args, kwargs = tree_map_only(Tensor, lambda leaf: _cast(leaf, inner), (args, kwargs))
        views = self.views(tensors, training)
        output = views[-1](*args, **kwargs)
        self._keep(views, tensors)
        if outer is None:
            return output
        return tree_map_only(Tensor, lambda leaf: _cast(leaf, outer), output)

    def _takes(self, name: str) -> bool:
        return self.takes is None or name in self.takes

    def views(self, tensors: Mapping[str, Any], training: Any) -> list[nn.Module]:
        """Returns views of the skeleton's modules with these tensors or values, the outermost last."""
        views = [object.__new__(part.cls) for part in self.parts]
        for view, part in zip(views, self.parts, strict=True):
            state = dict(part.plain)
            state["training"] = training
            state["_parameters"] = {name: None if word is None else tensors[word] for name, word in part.parameters}
            state["_buffers"] = {name: None if word is None else tensors[word] for name, word in part.buffers}
            state["_modules"] = {name: None if number is None else views[number] for name, number in part.children}
            for name, slot in part.built:
                state[name] = _build(slot, tensors, views)
            view.__dict__.update(state)
        return views

    def _keep(self, views: list[nn.Module], tensors: Mapping[str, Tensor]) -> None:
        """Copy buffers that the forward has set to the adapter. Raises `SiteError` for other attributes."""
        for view, part in zip(views, self.parts, strict=True):
            for name, word in part.buffers:
                if word is not None and (new := view._buffers[name]) is not tensors[word]:
                    _copy_buffer(tensors[word], new, view, name)
        if not torch.compiler.is_compiling():
            self.check_unchanged(views)

    def check_unchanged(self, views: list[nn.Module]) -> None:
        """Raise `SiteError` if a forward has set an attribute, which would be lost after the call."""
        for view, part, contents in zip(views, self.parts, self.contents, strict=True):
            built = {name for name, _ in part.built}
            for name, value in view.__dict__.items():
                if name in _WIRING or name in built:
                    continue
                if part.plain.get(name, _NOTHING) is not value or contents[name] != _item_ids(value):
                    raise _attribute_error(type(view), name)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's tensors by dotted names, each once: parameters, buffers, and tensors in plain attributes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    seen = {id(tensor) for tensor in tensors.values()}
    for path, inner in module.named_modules():
        for name, value in inner.__dict__.items():
            if name in _OF_MODULES:
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value) if _is_list(value) else ()
            places = [(name, value), *((f"{name}.{key}", item) for key, item in items)]
            for place, tensor in places:
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensors[f"{path}.{place}" if path else place] = tensor
    return tensors


def _words(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the adapter's name of each tensor: its name in the module with `_` for a dot."""
    words: dict[str, str] = {}
    for name in tensors:
        word = "".join(letter if letter.isalnum() else "_" for letter in name)
        word = word if word.isidentifier() and not hasattr(nn.Module, word) else f"_{word}"
        while word in words:
            word = f"{word}_"
        words[word] = name
    return words


def _hollow(module: nn.Module) -> nn.Module:
    """Returns a copy of a module on the meta device, with tied tensors still tied."""
    if lazy := lazy_in(module):
        raise RuleError(
            f"{type(module).__name__} has tensors without a shape: {', '.join(lazy)}",
            why="they get a shape at the first call",
            fix="pass sizes, or run one batch through the module first",
        )
    memo: dict[int, Any] = {}
    for tensor in named_tensors(module).values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        flag = tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(empty, flag) if isinstance(tensor, nn.Parameter) else empty
    hollow = copy.deepcopy(module, memo)
    for inner in hollow.modules():
        if isinstance(inner, torch.jit.ScriptModule):
            raise RuleError(f"{type(module).__name__} contains TorchScript", fix="pass the original Python module")
        buffers = set(inner._buffers)
        if left := [name for name in _assigned(type(inner).forward) if name not in buffers]:
            raise _attribute_error(type(inner), left[0])
    return hollow


def _assigned(forward: Any) -> tuple[str, ...]:
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


def _parts(module: nn.Module, words: Mapping[str, str]) -> tuple[ModulePart, ...]:
    """Returns the parts of a skeleton's modules, the outermost last."""
    inside = [inner for _, inner in module.named_modules()][::-1]
    numbers = {id(inner): number for number, inner in enumerate(inside)}
    called = {id(tensor): words[name] for name, tensor in named_tensors(module).items()}
    parts = []
    for inner in inside:
        plain = {name: value for name, value in inner.__dict__.items() if name not in _WIRING}
        slots = {name: _slot(value, called, numbers) for name, value in plain.items() if name not in _OF_MODULES}
        built = {name: slot for name, slot in slots.items() if slot.kind != "plain"}
        parts.append(
            ModulePart(
                _view_class(type(inner), inner),
                {name: value for name, value in plain.items() if name not in built},
                tuple((name, None if t is None else called[id(t)]) for name, t in inner._parameters.items()),
                tuple((name, None if t is None else called[id(t)]) for name, t in inner._buffers.items()),
                tuple((name, None if c is None else numbers[id(c)]) for name, c in inner._modules.items()),
                tuple(built.items()),
            )
        )
    return tuple(parts)


def _slot(value: Any, called: Mapping[int, str], numbers: Mapping[int, int]) -> AttributeContent:
    if isinstance(value, Tensor) and id(value) in called:
        return AttributeContent("tensor", called[id(value)])
    if isinstance(value, nn.Module) and id(value) in numbers:
        return AttributeContent("module", numbers[id(value)])
    if isinstance(value, types.MethodType) and id(value.__self__) in numbers:
        return AttributeContent("method", (value.__func__, numbers[id(value.__self__)]))
    if isinstance(value, weakref.ref) and id(value()) in called:
        return AttributeContent("reference", called[id(value())])
    for kind in ("list", "tuple", "dict"):
        if type(value).__name__ == kind and isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            slots = [_slot(item, called, numbers) for item in items]
            if any(slot.kind != "plain" for slot in slots):
                return AttributeContent(kind, tuple(zip(value, slots, strict=True)))
    return AttributeContent("plain", value)


def _build(slot: AttributeContent, tensors: Mapping[str, Tensor], views: list[nn.Module]) -> Any:
    kind, content = slot
    if kind == "tensor":
        return tensors[content]
    if kind == "module":
        return views[content]
    if kind == "method":
        return types.MethodType(content[0], views[content[1]])
    if kind == "reference":
        return weakref.ref(tensors[content])
    if kind == "dict":
        return {key: _build(inner, tensors, views) for key, inner in content}
    if kind == "plain":
        return content
    items = [_build(inner, tensors, views) for _, inner in content]
    return tuple(items) if kind == "tuple" else items


def _view_class(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """Returns the class of a view. If the forward sets buffers, it is a subclass that simply stores them.

    nn.Module's own `__setattr__` inspects signatures, and torch.compile can't trace that on a view.
    """
    if not any(name in module._buffers for name in _assigned(cls.forward)):
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


def _item_ids(value: Any) -> tuple[int, ...]:
    """Returns the ids of a container's items, to detect a change by a forward."""
    items = value.values() if isinstance(value, dict) else value
    return tuple(map(id, items)) if isinstance(value, (list, dict, set)) else ()


def _cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


def _copy_buffer(tensor: Tensor, new: Tensor | None, view: nn.Module, name: str) -> None:
    if new is None or new.shape != tensor.shape:
        raise SiteError(
            f"{type(view).__name__}.forward changes the shape of its buffer {name}",
            why="the shape of an adapter's tensors is fixed",
            fix="write into the buffer in place",
        )
    with torch.no_grad():
        tensor.copy_(new)


def _attribute_error(cls: type[nn.Module], name: str) -> SiteError:
    return SiteError(
        f"{cls.__name__}.forward sets {name} on the module",
        why="between calls an adapter keeps only tensors",
        fix=f"register {name} as a buffer, or return it",
    )


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


_NOTHING = object()
_WIRING = frozenset({"_parameters", "_buffers", "_modules", "training"})
_OF_MODULES = frozenset(nn.Module().__dict__)
_SIMPLE = (
    int,
    float,
    str,
    type(None),
    tuple,
    torch.dtype,
    torch.device,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
)
_assigned_names: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
_setters: weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakKeyDictionary()
_known: weakref.WeakValueDictionary[tuple, Skeleton] = weakref.WeakValueDictionary()
