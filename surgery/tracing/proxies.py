"""The objects that a traced forward sees: views of modules, and proxies of objects such as a KV cache.

A *view* is an instance of a subclass of the module's own class, and shares the module's state. It reports the settings
that the forward reads and rejects writes. A call of a child's view is one node. A *recorded object* is a proxy: calls
of its methods are nodes, its tensors and numbers are tracked, and decisions of Python on it become guards. For
`isinstance`, both have the class of the real object.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from surgery.errors import TraceError

__all__ = ["Listener", "RecordedList", "RecordedObject", "call_object", "is_setting", "view_class"]


class Listener(Protocol):
    """Receives a report of each operation of the forward on a view or a recorded object."""

    def paused(self) -> AbstractContextManager[None]: ...
    def real(self, value: Any) -> Any: ...
    def decide(self, function: Any, args: tuple) -> Any: ...
    def path_of(self, module: nn.Module) -> str: ...
    def read_attribute(self, owner: nn.Module, name: str, value: Any) -> Any: ...
    def read_item(self, owner: Any, function: Any, key: Any, value: Any) -> Any: ...
    def write_to(self, function: Any, args: tuple) -> None: ...
    def call_module(self, child: nn.Module, args: tuple, kwargs: dict) -> Any: ...
    def call_object(self, owner: Any, args: tuple, kwargs: dict) -> Any: ...
    def call_method(self, owner: Any, name: str, /, *args: Any, **kwargs: Any) -> Any: ...


_SETTINGS = (bool, str, float, type(None), bytes)


def is_setting(value: Any) -> bool:
    """Whether a value is plain and comparable: a flag, a text, a number, a dtype, or a collection of these."""
    if type(value) in (tuple, list, set, frozenset):
        return all(is_setting(item) or type(item) is int for item in value)
    if type(value) is dict:
        return all(is_setting(item) or type(item) is int for pair in value.items() for item in pair)
    return type(value) in _SETTINGS or type(value).__module__ == "torch" and not isinstance(value, (Tensor, nn.Module))


@functools.cache
def view_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the class for views of modules of a class."""

    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or name in _MODULE_STATE:
            return value
        state = object.__getattribute__(self, "__dict__")
        if name not in state or "_surgery_recorder" not in state:
            return value
        return state["_surgery_recorder"].read_attribute(self, name, value)

    def write(self: Any, name: str, value: Any = None) -> None:
        listener: Listener = self.__dict__["_surgery_recorder"]
        raise TraceError(
            f"the forward sets {name} on {listener.path_of(self) or 'the module'}",
            why="a graph holds what is computed, not what is remembered between calls",
        )

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_surgery_recorder"].call_module(self, args, kwargs)

    space = {
        "__getattribute__": read,
        "__setattr__": write,
        "__delattr__": write,
        "__call__": call,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), space)


_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"} | {"_surgery_recorder"}


class _Proxy:
    """Reports each operation to the listener, and performs it on the real object to get its value."""

    __slots__ = ()

    _listener: Listener
    _node: Any
    _real: Any
    _settled: tuple[Any, ...] | None

    def __init__(self, listener: Listener, node: Any, real: Any, settled: tuple[Any, ...] | None = None):
        object.__setattr__(self, "_listener", listener)
        object.__setattr__(self, "_node", node)
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_settled", settled)

    @property
    def __class__(self) -> type:
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:  # missing if other code, such as copy, creates the proxy without `__init__`
            raise AttributeError(name)
        listener = self._listener
        with listener.paused():
            value = getattr(self._real, name, _MISSING)
        if value is _MISSING:
            if not name.startswith("__"):
                listener.decide(hasattr, (self, name))
            raise AttributeError(f"{type(self._real).__name__!r} object has no attribute {name!r}")
        if isinstance(self._real, dict) and name in _VIEWS:
            return functools.partial(_VIEWS[name], self)
        if isinstance(value, (types.MethodType, types.BuiltinMethodType, functools.partial)):
            return functools.partial(listener.call_method, self, name)
        if isinstance(value, (type, types.FunctionType)):
            return value
        return listener.read_item(self, getattr, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._listener.write_to(setattr, (self, name, value))

    def __delattr__(self, name: str) -> None:
        self._listener.write_to(delattr, (self, name))

    def __getitem__(self, key: Any) -> Any:
        with self._listener.paused():
            value = self._real[self._listener.real(key)]
        return self._listener.read_item(self, operator.getitem, key, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._listener.write_to(operator.setitem, (self, key, value))

    def __delitem__(self, key: Any) -> None:
        self._listener.write_to(operator.delitem, (self, key))

    def __len__(self) -> int:
        return self._listener.decide(len, (self,))

    def __bool__(self) -> bool:
        return self._listener.decide(operator.truth, (self,))

    def __contains__(self, key: Any) -> bool:
        return self._listener.decide(operator.contains, (self, key))

    def __eq__(self, other: object) -> bool:
        return self._listener.decide(operator.eq, (self, other))

    def __ne__(self, other: object) -> bool:
        return self._listener.decide(operator.ne, (self, other))

    def __hash__(self) -> int:
        return id(self._real)

    def __iter__(self) -> Any:
        if hasattr(type(self._real), "keys") or not hasattr(type(self._real), "__getitem__"):
            return iter(self._listener.decide(list, (self,)))  # names and plain values; Python may depend on them
        return iter([self[index] for index in range(len(self))])

    def __reversed__(self) -> Any:
        return iter(list(self)[::-1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._listener.call_object(self, args, kwargs)

    def __copy__(self) -> Any:
        raise TraceError(f"the forward copies a {type(self._real).__name__}")

    def __deepcopy__(self, memo: dict) -> Any:
        if self._settled is None:
            raise TraceError(f"the forward copies a {type(self._real).__name__}")
        return self._real


_MISSING = object()
_FIELDS = ("_node", "_real", "_listener", "_settled")
_VIEWS: dict[str, Callable[[Any], list]] = {
    "keys": list,
    "values": lambda mapping: [mapping[key] for key in mapping],
    "items": lambda mapping: [(key, mapping[key]) for key in mapping],
}


class RecordedObject(_Proxy):
    """A proxy of an object that is not a tensor.

    `settled`: the path of an object that belongs to the module, such as a config. The graph then checks its settings
    once, at the start. Settings of other objects are checked where the forward reads them.
    """

    __slots__ = _FIELDS


class RecordedList(_Proxy, list):
    """A proxy of a list. It is a true list, because torch accepts no other; its own items are never used."""

    __slots__ = _FIELDS

    def __init__(self, listener: Listener, node: Any, real: list, settled: tuple[Any, ...] | None = None):
        list.__init__(self, real)
        _Proxy.__init__(self, listener, node, real, settled)

    def __add__(self, other: Any) -> Any:
        return [*self, *other]

    def __radd__(self, other: Any) -> Any:
        return [*other, *self]

    def __iadd__(self, other: Any) -> Any:
        self._listener.write_to(operator.iadd, (self, other))
        return self

    def __mul__(self, times: Any) -> Any:
        return list(self) * times

    __rmul__ = __mul__

    def copy(self) -> list:
        return list(self)


def _method(name: str) -> Any:
    return lambda self, *args, **kwargs: self._listener.call_method(self, name, *args, **kwargs)


for _name in ("append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort", "index", "count"):
    setattr(RecordedList, _name, _method(_name))


def call_object(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an object that is the result of a node."""
    return function(*args, **kwargs)
