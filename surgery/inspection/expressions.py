"""Writes nodes of a graph as Python expressions: operators, methods, attributes and calls as people write them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery.forward.graph_functions import detached, in_dtype, same_dtype
from surgery.forward.hidden_state import with_hidden
from surgery.forward.parameter_view import base_forward, call_own, forward_around, make_view
from surgery.inspection.adapter_modules import AdapterModule, adapter_of
from surgery.inspection.function_names import INFIX, FunctionNames
from surgery.tracing.proxies import call_object
from surgery.weaving.wrapped_calls import HandedOn, call_wrapped

__all__ = ["Expressions", "path_text"]

_ATOM, _UNARY, _POWER, _COMPARED = 100, 80, 90, 30
_PREFIX = {operator.neg: "-", operator.pos: "+", operator.invert: "~"}
_SINGLE = (Ellipsis, slice)


class Expressions:
    """Writes the text of nodes. `variables`: the names of nodes with lines of their own; other nodes are written out.

    Methods that return a pair return the text and its precedence: how tightly its outermost operator binds.
    """

    def __init__(self, module: nn.Module, base: type[nn.Module], names: FunctionNames, constants: Mapping[str, Any]):
        self.module, self.base, self.names, self.constants = module, base, names, constants
        self.variables: dict[fx.Node, str] = {}
        self._modules: dict[tuple[int, tuple[str, ...]], AdapterModule] = {}
        self._special: dict[Any, Callable[[fx.Node], tuple[str, int]]] = {
            same_dtype: self._same_dtype,
            in_dtype: lambda node: self._cast(node, self.text(node.args[1])),
            detached: lambda node: (f"{self.text(node.args[0], _ATOM)}.detach()", _ATOM),
            base_forward: self._base_forward,
            call_wrapped: self._call_wrapped,
            call_object: lambda node: (self._call(self.text(node.args[0], _ATOM), node.args[1:], node.kwargs), _ATOM),
            getattr: self._attribute,
            operator.getitem: self._item,
            operator.contains: lambda node: self._infix("in", _COMPARED, node.args[1], node.args[0]),
            operator.abs: lambda node: (f"abs({self.text(node.args[0])})", _ATOM),
        }

    def text(self, value: Any, tightness: int = 0) -> str:
        """The text of a value, in parentheses if its precedence is below `tightness`."""
        if isinstance(value, fx.Node):
            text, node_tightness = (self.variables[value], _ATOM) if value in self.variables else self.node_text(value)
        else:
            text, node_tightness = self._constant_text(value)
        return text if node_tightness >= tightness else f"({text})"

    def node_text(self, node: fx.Node) -> tuple[str, int]:
        """The expression of a node, and its precedence."""
        if node.op == "placeholder":
            return str(node.target).lstrip("*"), _ATOM
        if node.op == "get_attr":
            return path_text(self.module, str(node.target)), _ATOM
        if node.op == "call_module":
            return self._call(path_text(self.module, str(node.target)), node.args, node.kwargs), _ATOM
        if node.op == "call_method":
            owner, *args = node.args
            return self._call(f"{self.text(owner, _ATOM)}.{node.target}", args, node.kwargs), _ATOM
        if node.target in self._special:
            return self._special[node.target](node)
        if (adapter := adapter_of(node)) is not None:
            return self._adapter_module(node, *adapter)
        return self._function(node)

    def _adapter_module(self, node: fx.Node, owner: str, words: tuple[str, ...]) -> tuple[str, int]:
        skeleton: Any = node.target
        maker = self._modules.setdefault((id(skeleton), words), AdapterModule(skeleton, words))
        _, training, args, kwargs, *more = node.args
        module = f"{self.names.name_of(maker)}({path_text(self.module, owner)}, {self.text(training)})"
        texts = [self.text(value) for value in args]  # type: ignore[union-attr]
        further: Any = more[0] if more else ()
        texts += [f"*{self.text(further, _ATOM)}"] if isinstance(further, fx.Node) else [self.text(x) for x in further]
        return f"{module}({', '.join([*texts, *self._keywords(kwargs)])})", _ATOM

    def _function(self, node: fx.Node) -> tuple[str, int]:
        target: Any = node.target
        if target in INFIX and len(node.args) == 2:
            return self._infix(*INFIX[target], *node.args)
        if target in _PREFIX:
            return _PREFIX[target] + self.text(node.args[0], _UNARY), _UNARY
        if isinstance(target, HandedOn):
            return self.names.name_of(target()), _ATOM
        owner = getattr(target, "__objclass__", None)
        if inspect.ismethoddescriptor(target) and owner is not None and issubclass(torch.Tensor, owner):
            return self._method_of_tensors(target.__name__, node)
        args, kwargs = _shortened(target, node.args, node.kwargs)
        return self._call(self.names.name_of(target), args, kwargs), _ATOM

    def _method_of_tensors(self, name: str, node: fx.Node) -> tuple[str, int]:
        word = name.strip("_").removeprefix("r")
        function = getattr(operator, word, None)
        if name.startswith("__r") and function in INFIX:
            return self._infix(*INFIX[function], node.args[1], node.args[0])
        return self._call(f"{self.text(node.args[0], _ATOM)}.{name}", node.args[1:], node.kwargs), _ATOM

    def _infix(self, sign: str, tightness: int, left: Any, right: Any) -> tuple[str, int]:
        left_tightness, right_tightness = tightness, tightness + 1
        if sign == "**":
            left_tightness, right_tightness = tightness + 1, _UNARY
        elif tightness == _COMPARED or sign == "@" and getattr(left, "target", None) is not operator.matmul:
            left_tightness = right_tightness
        return f"{self.text(left, left_tightness)} {sign} {self.text(right, right_tightness)}", tightness

    def _attribute(self, node: fx.Node) -> tuple[str, int]:
        owner, name, *default = node.args
        if default or not str(name).isidentifier():
            return self._call("getattr", node.args, {}), _ATOM
        return f"{self.text(owner, _ATOM)}.{name}", _ATOM

    def _item(self, node: fx.Node) -> tuple[str, int]:
        owner, key = node.args
        if isinstance(owner, fx.Node) and owner.op == "placeholder" and key in self.constants:
            return self.names.name_of(self.constants[str(key)]), _ATOM
        return f"{self.text(owner, _ATOM)}[{self.key_text(key)}]", _ATOM

    def key_text(self, key: Any) -> str:
        """The text between the brackets of `value[key]`."""
        if isinstance(key, tuple) and key:
            text = ", ".join(self.key_text(item) if not isinstance(item, tuple) else self.text(item) for item in key)
            return f"{text}," if len(key) == 1 else text
        if isinstance(key, slice):
            start, stop, step = ("" if part is None else self.text(part) for part in (key.start, key.stop, key.step))
            return f"{start}:{stop}" + (f":{step}" if step else "")
        return self.text(key)

    def _same_dtype(self, node: fx.Node) -> tuple[str, int]:
        new, old = node.args
        if isinstance(new, fx.Node) and new not in self.variables:
            casts = new.target is with_hidden and new.args[0] is old  # it casts by itself
            if casts or _returns_type_of(new, old):
                return self.node_text(new)
        return self._cast(node, f"{self.text(old, _ATOM)}.dtype")

    def _cast(self, node: fx.Node, dtype: str) -> tuple[str, int]:
        """A cast that the engine adds around a rule's value."""
        value = node.args[0]
        if isinstance(value, fx.Node) and not _surely_tensor(value):
            return self._call(self.names.name_of(node.target), node.args, node.kwargs), _ATOM
        return f"{self.text(value, _ATOM)}.to({dtype})", _ATOM

    def _base_forward(self, node: fx.Node) -> tuple[str, int]:
        """A call of the module's own forward, possibly with other tensors."""
        itself, tensors, positional, more, named, extra, *around = node.args
        args: list[str] = [self.text(value) for value in positional]  # type: ignore[union-attr]
        args += [f"*{self.text(more, _ATOM)}"] if isinstance(more, fx.Node) else [self.text(value) for value in more]  # type: ignore[union-attr]
        arguments = ", ".join([*args, *self._keywords(named), *self._keywords(extra)])
        if around and around[0] and tensors:
            return self._call(self.names.name_of(base_forward), node.args, {}), _ATOM
        if around and around[0]:
            wrappers: Any = around[0]
            wrapper = self.text(wrappers[0] if len(wrappers) == 1 else tuple(wrappers))
            words = filter(None, (self.text(itself), wrapper, arguments))
            return f"{self.names.name_of(forward_around)}({', '.join(words)})", _ATOM
        if not tensors:
            return f"super().forward({arguments})", _ATOM
        if not (named or extra or more) and all(str(name).isidentifier() for name in tensors):  # type: ignore[union-attr]
            return (
                f"{self.names.name_of(call_own)}({', '.join([self.text(itself), *args, *self._keywords(tensors)])})",
                _ATOM,
            )
        base = self.names.name_of(self.base)
        view = f"{self.names.name_of(make_view)}({self.text(itself)}, {base}, {self.text(tensors)})"
        return f"{base}.forward({', '.join(filter(None, [view, arguments]))})", _ATOM

    def _call_wrapped(self, node: fx.Node) -> tuple[str, int]:
        function, around, *args = node.args
        if len(around) != 1:  # type: ignore[arg-type]
            return self._call(self.names.name_of(call_wrapped), node.args, node.kwargs), _ATOM
        return self._call(self.text(around[0], _ATOM), (function, *args), node.kwargs), _ATOM  # type: ignore[index]

    def _call(self, function: str, args: Any, kwargs: Any) -> str:
        return f"{function}({', '.join([*map(self.text, args), *self._keywords(kwargs)])})"

    def _keywords(self, kwargs: Any) -> list[str]:
        if isinstance(kwargs, fx.Node):
            return [f"**{self.text(kwargs, _ATOM)}"]
        if not all(isinstance(name, str) and name.isidentifier() for name in kwargs):
            return [f"**{self.text(kwargs)}"]
        return [f"{name}={self.text(value)}" for name, value in kwargs.items()]

    def _constant_text(self, value: Any) -> tuple[str, int]:
        """The text of a constant, or of a container of values, and its precedence."""
        if isinstance(value, torch.Size):
            return f"torch.Size({self.text(list(value))})", _ATOM
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._call(self.names.name_of(type(value)), value, {}), _ATOM
        if isinstance(value, (tuple, list)):
            text = ", ".join(map(self.text, value))
            if isinstance(value, list):
                return f"[{text}]", _ATOM
            return f"({text},)" if len(value) == 1 else f"({text})", _ATOM
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.text(key)}: {self.text(item)}" for key, item in value.items()) + "}", _ATOM
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})", _ATOM
        text = self.names.constant(value)
        tight = not text.startswith("-") and not isinstance(value, (int, float)) or isinstance(value, bool)
        return text, _ATOM if tight else _UNARY if text.startswith("-") else _ATOM - 1


def path_text(module: nn.Module, path: str) -> str:
    """`self.layers[0].weight` for the path "layers.0.weight"."""
    text, owner = "self", module
    for part in [] if path == "_surgery_self" else path.split("."):
        if part.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ParameterList)):
            text = f"{text}[{part}]"
        else:
            text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
        owner = getattr(owner, part, None)
    return text


def _returns_type_of(node: fx.Node, value: Any) -> bool:
    """Whether a function is declared to return the type of this argument: `def f(output: T, …) -> T`."""
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    declared = inspect.get_annotations(node.target)
    returned = declared.pop("return", None)
    variable = node.target.__globals__.get(returned) if isinstance(returned, str) else returned
    if not isinstance(variable, TypeVar):
        return False
    positional = zip(inspect.signature(node.target).parameters, node.args, strict=False)
    arguments = {**dict(positional), **node.kwargs}
    return any(arguments.get(name) is value for name, type_ in declared.items() if type_ == returned)


def _surely_tensor(node: fx.Node) -> bool:
    """Whether the operation shows that a node's value is a tensor: an operator or a function of torch."""
    if node.op == "call_method":
        return hasattr(torch.Tensor, str(node.target))
    module = str(getattr(node.target, "__module__", None) or "torch")
    torchs = module.partition(".")[0] == "torch" or node.target in INFIX
    return node.op == "call_function" and (torchs or node.target in (same_dtype, in_dtype, detached))


def _is_default(parameter: inspect.Parameter | None, value: Any) -> bool:
    return parameter is not None and type(value) is type(parameter.default) and value == parameter.default


def _shortened(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Leave out arguments that equal a torch function's defaults; pass others by position where that is clear."""
    if target is F.linear:
        return args[:2] if len(args) == 3 and args[2] is None else args, kwargs
    if not str(getattr(target, "__module__", "")).startswith("torch.") or not inspect.isfunction(target):
        return args, kwargs
    parameters = inspect.signature(target).parameters
    defaults = {name for name, value in kwargs.items() if _is_default(parameters.get(name), value)}
    positions = [index for index, name in enumerate(parameters) if name in kwargs and name not in defaults]
    defaults -= set(
        list(parameters)[: max(positions, default=0)]
    )  # a default before a passed argument keeps its position
    keywords = {name: value for name, value in kwargs.items() if name not in defaults}
    args = list(args)
    for name, parameter in list(parameters.items())[len(args) :]:
        if type(keywords.get(name, False)) is bool or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        args.append(keywords.pop(name))
    return args, keywords
