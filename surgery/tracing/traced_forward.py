"""Traces forwards as graphs of operations for one kind of call. Similar modules share a graph."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from surgery.forward.empty_graph import empty_graph
from surgery.forward.own_forward import OwnForward
from surgery.forward.parameter_view import make_view
from surgery.tracing.call_kind import kind_of_call
from surgery.tracing.decisions import decide, decide_parts
from surgery.tracing.depth import LAYERS, Depth
from surgery.tracing.fx_args import replace_nodes
from surgery.tracing.guards import check_call, check_parts, check_settings, require, same_settings
from surgery.tracing.trace import traced

__all__ = ["TracedForward", "goes_through", "trace_for_call", "known_forwards", "trace_anew"]


@dataclass(frozen=True, eq=False)
class TracedForward:
    """A graph with its constants, the module settings that it needs, and the numbers that its shapes depend on.

    Each call reads the numbers again; the shapes in the graph are those of modules with the same numbers. `variants`:
    the sites' rewritten forms of the graph, by their edits.
    """

    graph: fx.Graph
    constants: Mapping[str, Any]
    settings: tuple
    numbers: tuple
    variants: WeakValueDictionary[tuple, Any] = field(default_factory=WeakValueDictionary)

    def fits(self, module: nn.Module) -> bool:
        return same_settings(module, self.settings)


def trace_for_call(
    module: nn.Module, own: OwnForward, args: tuple, kwargs: dict[str, Any], depth: Depth = LAYERS
) -> OwnForward:
    """Returns the forward of a module with a graph for calls like this one. Raises `TraceError` if it can't be traced.

    `depth`: whose operations the graph contains besides those of the forward itself.
    """
    bound = own.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = tuple(bound.arguments.values())
    kind = kind_of_call(module, arguments)
    for forward in known_forwards(module, own, kind, depth):
        if forward.fits(module) and same_settings(module, forward.numbers):
            return replace(own, tapes=None, graph=forward.graph)
    return replace(own, tapes=None, graph=trace_anew(module, own, arguments, kind, depth).graph)


def goes_through(graph: fx.Graph) -> bool:
    """Whether a graph contains the operations of functions from registries, instead of their calls."""
    return any("registry" in node.meta for node in graph.nodes)


def known_forwards(module: nn.Module, own: OwnForward, kind: tuple, depth: Depth = LAYERS) -> list[TracedForward]:
    """Returns the list of known graphs of modules like this one, for calls of a kind."""
    return _known.setdefault(own.base, {}).setdefault((_likeness(module), kind, depth), [])


def trace_anew(
    module: nn.Module, own: OwnForward, arguments: tuple, kind: tuple, depth: Depth = LAYERS
) -> TracedForward:
    """Trace a module's own forward for a call, also in the middle of another call."""
    patient = make_view(module, own.base, {})
    patient.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != "adapters"}
    args, kwargs = _as_call(own, arguments)
    with _by_itself():
        graph = traced(patient, args, kwargs, None, depth)
    forward = _settled(graph, module.training)
    known_forwards(module, own, kind, depth).append(forward)
    return forward


def _as_call(own: OwnForward, arguments: tuple) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments as an opaque site passes them to its base: parameters with a default by name."""
    parameters = list(own.signature.parameters.values())
    starred = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter, value in zip(parameters, arguments, strict=True):
        by_name = parameter.default is not parameter.empty and not starred and own.names_hold
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif parameter.kind is parameter.KEYWORD_ONLY or by_name and parameter.kind is not parameter.POSITIONAL_ONLY:
            kwargs[parameter.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


@contextmanager
def _by_itself() -> Iterator[None]:
    """Disables inference mode and hooks on saved tensors while tracing inside another call."""
    same: Callable[[Any], Any] = lambda tensor: tensor  # noqa: E731
    with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(same, same):
        yield


def _settled(traced: fx.GraphModule, training: bool) -> TracedForward:
    """Returns the graph without its checks of the call kind and settings, and with its decisions moved to the start."""
    graph = empty_graph()
    output = graph.graph_copy(traced.graph, {})
    graph.output(output)
    settings: tuple = ()
    for node in list(graph.nodes):
        if node.target is check_settings:
            settings = node.args[1]
        if node.target in (check_call, check_settings):
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.target is require]:
        _moved_up(node, graph)
    late = False
    for node in graph.nodes:
        late = late or _leaves_a_trace(node, training)
        if node.target in _DECIDING:
            node.target, node.args = _DECIDING[node.target], (*node.args, late)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    read = {node: operator.attrgetter(str(node.target))(traced) for node in graph.nodes if node.op == "get_attr"}
    constants = {str(node.target): value for node, value in read.items() if str(node.target).startswith("_kept_")}
    numbers = [(tuple(str(node.target).split(".")), n) for node, n in read.items() if type(n) is int and _sizes(node)]
    return TracedForward(graph, constants, replace_nodes(settings, lambda node: node), tuple(numbers))


def _sizes(node: fx.Node) -> bool:
    """Whether a tensor depends on a number, and not only calls of objects (the index of a layer in a cache)."""
    return any("shape" in user.meta or user.target in _ON_NUMBERS for user in node.users)


_DECIDING = {require: decide, check_parts: decide_parts}


def _moved_up(node: fx.Node, graph: fx.Graph) -> None:
    """Move a decision on sizes of arguments before all other operations."""
    sources: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if source in sources:
            continue
        sources.add(source)
        if source.op == "call_function" and (source is node or source.target in _ON_NUMBERS):
            waiting += source.all_input_nodes
        elif source.op not in ("placeholder", "get_attr"):
            return
    first = next(n for n in graph.nodes if n.op not in ("placeholder",) and not n.meta.get("early"))
    for source in [n for n in graph.nodes if n in sources and n.op != "placeholder" and not n.meta.get("early")]:
        source.meta["early"] = True
        if source is first:
            first = first.next
        else:
            first.prepend(source)


def _leaves_a_trace(node: fx.Node, training: bool) -> bool:
    """Whether running a node twice may differ from running it once: it writes, draws, or calls unknown code."""
    if node.op == "call_method":
        name = str(node.target)
        if isinstance(node.args[0], fx.Node) and "shape" in node.args[0].meta:  # a tensor's
            return name.endswith("_")
        return name not in _READS and not name.startswith(("get_", "is_", "has_"))
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return name.rstrip("_") in _WRITES or name.endswith("_") and not name.endswith("__") or "drop" in name
    return node.op == "call_module" and training  # it may draw, or keep statistics


def _likeness(module: nn.Module) -> tuple:
    """Returns a key of everything that a graph depends on without checks: classes, dtypes, functions in attributes."""
    parts: list[Any] = []
    for path, inner in module.named_modules():
        if "adapters" in path.split("."):
            continue
        tensors = (*inner._parameters.items(), *inner._buffers.items())
        parts.append((path, getattr(inner, "_surgery_base", type(inner))))
        parts += [
            (name, None if tensor is None else (tensor.dtype, tensor.device, tensor.shape)) for name, tensor in tensors
        ]
        parts += [(name, value) for name, value in inner.__dict__.items() if isinstance(value, _COMPARED)]
    return tuple(parts)


_COMPARED = (type, types.FunctionType, types.BuiltinFunctionType)
_WRITES = frozenset({"setitem", "setattr", "in_region", "call_object", "rand", "randn", "rand_like", "randn_like",
                     "bernoulli", "multinomial", "normal", "randint", "randperm", "call_wrapped"})  # fmt: skip
_READS = frozenset({"get", "keys", "values", "items", "index", "count", "copy"})
_ON_NUMBERS = frozenset({getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
                         operator.truediv, operator.mod, operator.neg, operator.eq, operator.ne, operator.lt,
                         operator.le, operator.gt, operator.ge, len, int, float, max, min, Tensor.numel})  # fmt: skip
_known: WeakKeyDictionary[type[nn.Module], dict[tuple, list[TracedForward]]] = WeakKeyDictionary()
