"""A module without its numbers: its class, settings and wiring, called as itself on tensors that each call gives.

A rule that puts another module into a forward (`Site.submodule`, `rules.ReplaceRule`) keeps the module's tensors with
the adapter, as all others are kept. The rest of the module is a `Skeleton`: one function on the tape. A call of it
makes views of the module and of its children, which hold the adapter's tensors, and calls the outermost view. So the
forward may branch, unpack and loop; torch.compile and torch.export see the operations of an ordinary call. Nothing is
written to the skeleton, so threads and copies share it.
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


class Slot(NamedTuple):
    """What an attribute holds: a tensor by its word, a module by its number, or a container of such."""

    kind: str
    content: Any


class Part(NamedTuple):
    """One module of a skeleton: class, plain attributes, tensors and children by attribute, attributes to be built."""

    cls: type[nn.Module]
    plain: dict[str, Any]
    parameters: tuple[tuple[str, str | None], ...]
    buffers: tuple[tuple[str, str | None], ...]
    children: tuple[tuple[str, int | None], ...]
    built: tuple[tuple[str, Slot], ...]


class Skeleton:
    """A module on the meta device, and what its tensors are called. Equal modules have one skeleton between them.

    `words`: the name of each tensor, by what an adapter calls it; a tensor that is in several places has one.
    `module` is never called. Pickled as the module, on the meta device.
    """

    keeps_dtype = True  # what it returns has the dtype of what it was given: see `__call__`

    def __init__(self, module: nn.Module):
        tensors = named_tensors(module)
        self.module, self.words = module, _words(tensors)
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = __name__
        self.parts = _parts(module, {name: word for word, name in self.words.items()})
        parameters = inspect.signature(type(module).forward).parameters.values()
        starred = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.takes = None if starred else frozenset(parameter.name for parameter in parameters)
        self.contents = [{name: _contents(value) for name, value in part.plain.items()} for part in self.parts]
        self.floating = next((word for word, name in self.words.items() if tensors[name].is_floating_point()), None)

    @staticmethod
    def of(module: nn.Module) -> Skeleton:
        """The skeleton of a module; its tensors are not looked at, but for their shapes and dtypes."""
        made = Skeleton(_hollow(module))
        key = made._key()
        return made if key is None else _known.setdefault(key, made)

    def _key(self) -> tuple | None:
        """What is equal where two skeletons can't be told apart; None where an attribute can't be compared."""
        tensors = named_tensors(self.module)
        told = [
            (word, type(t := tensors[name]), tuple(t.shape), t.dtype, t.requires_grad)
            for word, name in self.words.items()
        ]
        key: list[Any] = [tuple(told)]
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
        found = tuple(key)
        try:
            hash(found)
        except TypeError:
            return None
        return found

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
        """The module's own call with these tensors in it.

        It computes in the dtype of its tensors: floating inputs are cast to it, and what comes out is cast back to the
        dtype that the first of them had; without floating inputs, to `like`'s. `more` are further positional
        arguments; `extra` has mappings of further ones by name: those are handed on that are not None and that the
        forward takes.
        """
        args = (*args, *more)
        for further in extra:
            taken = {name: value for name, value in further.items() if value is not None and self._takes(name)}
            kwargs = {**taken, **kwargs}
        outer: torch.dtype | None = None
        if self.floating is not None:
            inner = tensors[self.floating].dtype
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            given = [leaf for leaf in given if leaf.is_floating_point()]
            first = given[0] if given else like
            outer = first.dtype if first is not None and first.dtype != inner else None
            if any([leaf.dtype != inner for leaf in given]):
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
        """The skeleton's modules with these tensors, or values that stand for tensors; the outermost last."""
        made = [object.__new__(part.cls) for part in self.parts]
        for view, part in zip(made, self.parts, strict=True):
            state = dict(part.plain)
            state["training"] = training
            state["_parameters"] = {name: None if word is None else tensors[word] for name, word in part.parameters}
            state["_buffers"] = {name: None if word is None else tensors[word] for name, word in part.buffers}
            state["_modules"] = {name: None if number is None else made[number] for name, number in part.children}
            for name, slot in part.built:
                state[name] = _built(slot, tensors, made)
            view.__dict__.update(state)
        return made

    def _keep(self, views: list[nn.Module], tensors: Mapping[str, Tensor]) -> None:
        """Buffers that the forward set anew are the adapter's; other attributes have nowhere to be remembered."""
        for view, part in zip(views, self.parts, strict=True):
            for name, word in part.buffers:
                if word is not None and (new := view._buffers[name]) is not tensors[word]:
                    _put(tensors[word], new, view, name)
        if not torch.compiler.is_compiling():
            self.check_unchanged(views)

    def check_unchanged(self, views: list[nn.Module]) -> None:
        """`SiteError` where a forward has set an attribute: it would be forgotten."""
        for view, part, contents in zip(views, self.parts, self.contents, strict=True):
            built = {name for name, _ in part.built}
            for name, value in view.__dict__.items():
                if name in _WIRING or name in built:
                    continue
                if part.plain.get(name, _NOTHING) is not value or contents[name] != _contents(value):
                    raise _remembers(type(view), name)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by dotted names, each once: parameters, buffers, and those in plain attributes."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    seen = {id(tensor) for tensor in found.values()}
    for path, inner in module.named_modules():
        for name, value in inner.__dict__.items():
            if name in _OF_MODULES:
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value) if _listed(value) else ()
            places = [(name, value), *((f"{name}.{key}", item) for key, item in items)]
            for place, tensor in places:
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{place}" if path else place] = tensor
    return found


def _words(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What an adapter calls each tensor: its name with `_` for a dot."""
    found: dict[str, str] = {}
    for name in tensors:
        word = "".join(letter if letter.isalnum() else "_" for letter in name)
        word = word if word.isidentifier() and not hasattr(nn.Module, word) else f"_{word}"
        while word in found:
            word = f"{word}_"
        found[word] = name
    return found


def _hollow(module: nn.Module) -> nn.Module:
    """A copy of a module without numbers: on the meta device, with what is tied still tied."""
    if lazy := lazy_in(module):
        raise RuleError(
            f"{type(module).__name__} has tensors without a shape: {', '.join(lazy)}",
            why="they get one at the first call",
            fix="give sizes, or run one batch through the module first",
        )
    memo: dict[int, Any] = {}
    for tensor in named_tensors(module).values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        flag = tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(empty, flag) if isinstance(tensor, nn.Parameter) else empty
    made = copy.deepcopy(module, memo)
    for inner in made.modules():
        if isinstance(inner, torch.jit.ScriptModule):
            raise RuleError(f"{type(module).__name__} holds TorchScript", fix="give the module itself")
        buffers = set(inner._buffers)
        if left := [name for name in _assigned(type(inner).forward) if name not in buffers]:
            raise _remembers(type(inner), left[0])
    return made


def _assigned(forward: Any) -> tuple[str, ...]:
    """The attributes that a forward sets on its module."""
    if forward not in _stored:
        _stored[forward] = tuple(_stored_in(forward))
    return _stored[forward]


def _stored_in(forward: Any) -> list[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        itself = next(iter(inspect.signature(forward).parameters))
    except (OSError, TypeError, SyntaxError, ValueError, StopIteration):
        return []
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return [node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == itself]


def _parts(module: nn.Module, words: Mapping[str, str]) -> tuple[Part, ...]:
    """A skeleton's modules, the outermost last."""
    inside = [inner for _, inner in module.named_modules()][::-1]
    numbers = {id(inner): number for number, inner in enumerate(inside)}
    called = {id(tensor): words[name] for name, tensor in named_tensors(module).items()}
    parts = []
    for inner in inside:
        plain = {name: value for name, value in inner.__dict__.items() if name not in _WIRING}
        slots = {name: _slot(value, called, numbers) for name, value in plain.items() if name not in _OF_MODULES}
        built = {name: slot for name, slot in slots.items() if slot.kind != "plain"}
        parts.append(
            Part(
                _setting(type(inner), inner),
                {name: value for name, value in plain.items() if name not in built},
                tuple((name, None if t is None else called[id(t)]) for name, t in inner._parameters.items()),
                tuple((name, None if t is None else called[id(t)]) for name, t in inner._buffers.items()),
                tuple((name, None if c is None else numbers[id(c)]) for name, c in inner._modules.items()),
                tuple(built.items()),
            )
        )
    return tuple(parts)


def _slot(value: Any, called: Mapping[int, str], numbers: Mapping[int, int]) -> Slot:
    if isinstance(value, Tensor) and id(value) in called:
        return Slot("tensor", called[id(value)])
    if isinstance(value, nn.Module) and id(value) in numbers:
        return Slot("module", numbers[id(value)])
    if isinstance(value, types.MethodType) and id(value.__self__) in numbers:
        return Slot("method", (value.__func__, numbers[id(value.__self__)]))
    if isinstance(value, weakref.ref) and id(value()) in called:
        return Slot("reference", called[id(value())])
    for kind in ("list", "tuple", "dict"):
        if type(value).__name__ == kind and isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            slots = [_slot(item, called, numbers) for item in items]
            if any(slot.kind != "plain" for slot in slots):
                return Slot(kind, tuple(zip(value, slots, strict=True)))
    return Slot("plain", value)


def _built(slot: Slot, tensors: Mapping[str, Tensor], made: list[nn.Module]) -> Any:
    kind, content = slot
    if kind == "tensor":
        return tensors[content]
    if kind == "module":
        return made[content]
    if kind == "method":
        return types.MethodType(content[0], made[content[1]])
    if kind == "reference":
        return weakref.ref(tensors[content])
    if kind == "dict":
        return {key: _built(inner, tensors, made) for key, inner in content}
    if kind == "plain":
        return content
    items = [_built(inner, tensors, made) for _, inner in content]
    return tuple(items) if kind == "tuple" else items


def _setting(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """The class of a view: where the forward sets buffers anew, one that just does so. torch's own way of setting one
    looks at signatures, which a compiler can't follow on a module that comes from nowhere."""
    if not any(name in module._buffers for name in _assigned(cls.forward)):
        return cls
    if cls not in _setters:

        def put(self: Any, name: str, value: Any) -> None:
            if name in self._buffers:
                self._buffers[name] = value
            else:
                cls.__setattr__(self, name, value)

        metaclass: Any = type(cls)
        _setters[cls] = metaclass(cls.__name__, (cls,), {"__setattr__": put, "__module__": cls.__module__})
    return _setters[cls]


def _contents(value: Any) -> tuple[int, ...]:
    """What a container holds, to see whether a forward changed it."""
    items = value.values() if isinstance(value, dict) else value
    return tuple(map(id, items)) if isinstance(value, (list, dict, set)) else ()


def _cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


def _put(tensor: Tensor, new: Tensor | None, view: nn.Module, name: str) -> None:
    if new is None or new.shape != tensor.shape:
        raise SiteError(
            f"{type(view).__name__}.forward gives its buffer {name} another shape",
            why="an adapter's tensors keep theirs",
            fix="write into the buffer",
        )
    with torch.no_grad():
        tensor.copy_(new)


def _remembers(cls: type[nn.Module], name: str) -> SiteError:
    return SiteError(
        f"{cls.__name__}.forward sets {name} on the module",
        why="between calls an adapter keeps tensors alone",
        fix=f"register {name} as a buffer, or return it",
    )


def _listed(value: Any) -> bool:
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
_stored: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
_setters: weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakKeyDictionary()
_known: weakref.WeakValueDictionary[tuple, Skeleton] = weakref.WeakValueDictionary()
