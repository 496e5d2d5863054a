"""`Skeleton`: a module without its numbers (class, settings and wiring), called with the tensors of each call.

A rule that inserts another module into a forward (`Site.submodule`, `rules.ReplaceRule`) stores the module's tensors
with the adapter, like all its tensors. The rest of the module is a `Skeleton`: one function on the tape. Its call
creates views of the module and its children with the adapter's tensors, and calls the outermost view. So the forward
may branch, unpack and loop, and torch.compile and torch.export see the operations of an ordinary call. A call never
writes to the skeleton, so threads and copies share it.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from surgery.authoring.skeleton_parts import (
    OF_MODULES,
    WIRING,
    assigned_names,
    build_content,
    named_tensors,
    split_module,
)
from surgery.errors import RuleError, SiteError
from surgery.transaction.gradient_flags import lazy_in

__all__ = ["Skeleton", "tensor_words"]


class Skeleton:
    """A module on the meta device with the names of its tensors. Equal modules share a skeleton.

    `words` maps the adapter's name of a tensor to its name in the module; a tensor in several places has one name.
    `module` is never called. A skeleton is pickled as its module on the meta device.
    """

    keeps_dtype = True  # the result has the dtype of the first input: see `__call__`

    def __init__(self, module: nn.Module):
        tensors = named_tensors(module)
        self.module, self.words = module, tensor_words(tensors)
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = __name__
        self.parts = split_module(module, {name: word for word, name in self.words.items()})
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
        return skeleton if key is None else _skeletons.setdefault(key, skeleton)

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
                if name in OF_MODULES:
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
            accepted = {name: value for name, value in further.items() if value is not None and self._takes(name)}
            kwargs = {**accepted, **kwargs}
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
            for name, content in part.built:
                state[name] = build_content(content, tensors, views)
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
                if name in WIRING or name in built:
                    continue
                if part.plain.get(name, _NOTHING) is not value or contents[name] != _item_ids(value):
                    raise _attribute_error(type(view), name)


def tensor_words(tensors: Mapping[str, Tensor]) -> dict[str, str]:
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
        if unbuffered := [name for name in assigned_names(type(inner).forward) if name not in buffers]:
            raise _attribute_error(type(inner), unbuffered[0])
    return hollow


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


_NOTHING = object()
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
_skeletons: weakref.WeakValueDictionary[tuple, Skeleton] = weakref.WeakValueDictionary()
