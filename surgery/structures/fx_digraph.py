"""Converts torch.fx graphs to networkx: one graph, or a whole call of a model with the paths of its modules."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import SurgeryError, TraceError
from surgery.forward.parameter_view import make_view
from surgery.patterns.module_class import class_of
from surgery.patterns.offload_hooks import refuse_offloaded
from surgery.structures.op_aliases import LayerTensor, NodeName, arguments_in, canonicalise, flatten, is_node
from surgery.tracing.call_writer import Calls
from surgery.tracing.depth import Depth
from surgery.tracing.example_call import arguments, outermost_calls
from surgery.tracing.guards import check_call, check_parts, check_settings, require
from surgery.tracing.state_restoration import restore_state
from surgery.tracing.trace import traced
from surgery.transaction.object_contents import copied

if TYPE_CHECKING:
    import networkx

__all__ = ["as_digraph", "graph_of", "whole_graph"]


def as_digraph(graph: fx.Graph | fx.GraphModule, module: nn.Module | None = None) -> networkx.DiGraph:
    """Convert a torch.fx graph to a `networkx.DiGraph` with the `fx.Node`s as nodes and edges from values to users.

    >>> import torch
    >>> from torch import fx
    >>> from surgery import as_digraph
    >>> digraph = as_digraph(fx.symbolic_trace(lambda x: torch.softmax(x, -1) @ x))
    >>> [data["operation"] for _, data in digraph.nodes(data=True)]
    ['placeholder', 'softmax', 'matmul', 'output']

    Args:
        graph: The graph, or a module with a graph.
        module: The module whose children the graph calls. Needed for a graph without an owner, such as `site.graph`.
            Default None: the graph's owner.

    Returns:
        The graph. Attributes of a node: `op` and `target` as in fx; `operation`, `operands` and `keywords` of the
        canonical operation; `path` and `type` of the module that it calls; `shape` and `dtype` in the example, if
        known, else None (`trace`, `torch.export` and `torch.fx.passes.shape_prop` record them). Attribute of an
        edge: `slots`, the positions of the operand.

    Raises:
        SurgeryError: `graph` is not a graph.
    """
    import networkx

    inner = graph if isinstance(graph, fx.Graph) else getattr(graph, "graph", None)
    if not isinstance(inner, fx.Graph):
        raise SurgeryError(
            f"a {type(graph).__name__} is not a graph",
            fix="pass trace(module, example_inputs), a graph of torch.fx, or graph_of(model, example_inputs)",
        )
    digraph = networkx.DiGraph()
    owner = module or (graph if isinstance(graph, nn.Module) else inner.owning_module)
    for node in inner.nodes:
        module = _called_module(owner, node)
        op = canonicalise(node.op, node.target, arguments_in(node), node.kwargs, module, _rank(node))
        add_node(digraph, node, op, node, None if module is None else (str(node.target), class_of(module)))
    return digraph


def add_node(digraph: networkx.DiGraph, name: Any, op: Any, node: fx.Node, where: tuple[str, Any] | None) -> None:
    """Add a node, and the edges from its operands, which are already in the graph."""
    shape, dtype = _example(node)
    path, kind = where or (None, None)
    digraph.add_node(
        name, op=node.op, target=node.target, operation=op.operation, operands=op.operands,
        keywords=op.keywords, path=path, type=kind, shape=shape, dtype=dtype,
    )  # fmt: skip
    slots: dict[Any, list[Any]] = {}
    for slot, operand in (*enumerate(op.operands), *op.keywords.items()):
        for item in flatten(operand):
            if is_node(item):
                slots.setdefault(item, []).append(slot)
    for source, positions in slots.items():
        digraph.add_edge(source, name, slots=tuple(positions))


def graph_of(model: nn.Module, example_inputs: Any) -> networkx.DiGraph:
    """Trace a whole call of a model into one `networkx.DiGraph`, through all modules that can be traced.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import graph_of
    >>> graph = graph_of(nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2))), torch.randn(3, 4))
    >>> [(name, data["operation"], data["shape"]) for name, data in graph.nodes(data=True)][:3]
    [('input_1', 'placeholder', (3, 4)), ('0', 'linear', (3, 8)), ('1.0', 'relu', (3, 8))]

    Args:
        model: The model.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        The graph, for reading. Nodes are named by the path of their module and have the attributes of `as_digraph`;
        `path` and `type` are those of the module.

    Note:
        A layer of torch without children is one node. A module that can't be traced is one node with a `reason`, and
        the graph does not show its inside. The tracer's checks and the packing of outputs are omitted.
    """
    import networkx

    refuse_offloaded(model, "the graph of an offloaded model can't be made")
    args, kwargs = arguments(example_inputs)
    flat = _Flat(networkx.DiGraph())
    with torch.no_grad():
        flat.add_module(model, args, kwargs)
    return flat.graph


def whole_graph(model: nn.Module, example_inputs: Any) -> networkx.DiGraph:
    """As `graph_of`, through the own forwards of modules that have rules."""
    import networkx

    refuse_offloaded(model, "the graph of an offloaded model can't be made")
    args, kwargs = arguments(example_inputs)
    flat = _Flat(networkx.DiGraph(), without_rules=True)
    with torch.no_grad():
        flat.add_module(model, copied(args), copied(kwargs))
    return flat.graph


class _Flat:
    """Builds a flat graph from the graphs of modules. `without_rules`: also through forwards that rules rewrite."""

    def __init__(self, graph: networkx.DiGraph, without_rules: bool = False):
        self.graph, self.without_rules = graph, without_rules
        self.counts: dict[str, int] = {}

    def add_module(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = "") -> None:
        """Add a module with nodes for its inputs and its output."""
        calls: Calls = []
        try:
            graph = traced(self.own(model), args, kwargs, calls, Depth(leaves=False)).graph
        except TraceError as error:
            name = NodeName(self.unique(path or class_of(model).__name__))
            self.graph.add_node(
                name, op="call_module", target=path, operation=class_of(model).__name__, operands=(), keywords={},
                path=path, type=class_of(model), shape=None, dtype=None, reason=_reason(error),
            )  # fmt: skip
            self.add_inner_calls(model, path, args, kwargs)
        else:
            self.add_graph(model, path, graph, calls, None)

    def add_inner_calls(self, module: nn.Module, path: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the outermost modules that an untraceable module calls."""
        with restore_state(module):
            calls = outermost_calls(module, args, kwargs)
        for inner, child, child_args, child_kwargs in calls:
            if _is_layer(child):
                self.add_layer(child, _join_path(path, inner), child_args)
            else:
                self.add_module(child, child_args, child_kwargs, _join_path(path, inner))

    def add_layer(self, layer: nn.Module, path: str, args: tuple) -> None:
        """Add a layer as one node, and nodes for its inputs."""
        graph, values = fx.Graph(), {}
        for index, value in enumerate(args):
            source = graph.placeholder(f"input_{index}")
            source.meta |= {"shape": tuple(value.shape), "dtype": value.dtype} if isinstance(value, Tensor) else {}
            values[source] = self.node(source, path, layer, values)
        self.node(graph.call_module("layer", tuple(values)), path, layer, values, layer)

    def add_graph(
        self, module: nn.Module, path: str, graph: fx.Graph, calls: Calls, inputs: Mapping[str, Any] | None
    ) -> Any:
        """Add the graph of a module. `inputs` are its arguments by name. Returns the operands of its result."""
        values: dict[fx.Node, Any] = {}
        children = {node: (child, args, kwargs) for node, child, args, kwargs in calls}
        for node in graph.nodes:
            if node.op == "placeholder" and inputs is not None:
                values[node] = inputs.get(str(node.target).lstrip("*"))
            elif node.op == "output" and inputs is not None:
                return _replace_nodes(node.args[0], values)
            elif node in children:
                values[node] = self.child(node, path, values, *children[node])
            elif node.target in _OMITTED:
                values[node] = None
            elif node.op == "get_attr" and node.target == "_surgery_self":
                values[node] = LayerTensor(path or "(model)")
            else:
                packed, value = _unpack_value(node, values)
                values[node] = value if packed else self.node(node, path, module, values)
        return None

    def node(self, node: fx.Node, path: str, module: nn.Module, values: dict, child: nn.Module | None = None) -> Any:
        args, kwargs = _replace_nodes(arguments_in(node), values), _replace_nodes(dict(node.kwargs), values)
        target = node.target if child is None else path
        op = canonicalise(node.op, target, args, kwargs, child, _rank(node))
        if node.op == "get_attr":
            name = _join_path(path, str(node.target))
            if name in self.graph:  # a parameter is one node, however often it is read
                return NodeName(name)
        name = NodeName(self.unique(path if child is not None else _join_path(path, node.name)))
        add_node(self.graph, name, op, node, (path, class_of(child or module)))
        return name

    def child(self, node: fx.Node, path: str, values: dict, child: nn.Module, args: tuple, kwargs: dict) -> Any:
        inner = _join_path(path, str(node.target))
        if _is_layer(child):
            return self.node(node, inner, child, values, child)
        calls: Calls = []
        try:
            graph = traced(self.own(child), args, kwargs, calls, Depth(leaves=False)).graph
        except TraceError as error:
            name = self.node(node, inner, child, values, child)
            self.graph.nodes[name]["reason"] = _reason(error)
            self.add_inner_calls(child, inner, args, kwargs)
            return name
        signature = inspect.signature(class_of(child).forward)
        bound = signature.bind(None, *_replace_nodes(node.args, values), **_replace_nodes(dict(node.kwargs), values))
        bound.apply_defaults()
        return self.add_graph(child, inner, graph, calls, bound.arguments)

    def own(self, module: nn.Module) -> nn.Module:
        """Returns the module, or a view of it without its rules."""
        base = getattr(module, "_surgery_base", None)
        if not self.without_rules or base is None:
            return module
        view = make_view(module, base, {})
        view.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != "adapters"}
        return view

    def unique(self, name: str) -> str:
        self.counts[name] = count = self.counts.get(name, 0) + 1
        return name if count == 1 and name not in self.graph else f"{name}#{count}"


def _is_layer(module: nn.Module) -> bool:
    return class_of(module).__module__.startswith("torch.nn.") and not module._modules.keys() - {"adapters"}


def _unpack_value(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[bool, Any]:
    """Returns whether a node only packs values or unpacks one, and its result in that case."""
    if node.op != "call_function":
        return False, None
    if isinstance(node.target, type) and hasattr(node.target, "__dataclass_fields__"):
        return True, _replace_nodes(dict(node.kwargs), values)
    if isinstance(node.target, type) and hasattr(node.target, "_fields"):
        return True, _replace_nodes(tuple(node.args), values)
    if node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        owner, key = values.get(node.args[0]), node.args[1]
        if isinstance(owner, dict) and isinstance(key, int):
            owner = tuple(owner.values())
        try:
            if isinstance(owner, (tuple, list, dict)):
                return True, owner[key]  # type: ignore[index, call-overload]
        except (LookupError, TypeError):
            pass
    return False, None


def _replace_nodes(value: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Replaces the nodes in arguments by their values."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (tuple, list)):
        return tuple(_replace_nodes(item, values) for item in value)
    if isinstance(value, dict):
        return {key: _replace_nodes(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_replace_nodes(item, values) for item in (value.start, value.stop, value.step)))
    return value


def _called_module(owner: nn.Module | None, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module" or owner is None:
        return None
    try:
        return owner.get_submodule(str(node.target))
    except AttributeError:  # the graph is no longer in its module
        return None


def _rank(node: fx.Node) -> int | None:
    args = node.args[2:] if "called" in node.meta else node.args
    source = args[0] if args else node.kwargs.get("input")
    shape = _example(source)[0] if isinstance(source, fx.Node) else None
    return None if shape is None else len(shape)


def _example(node: fx.Node) -> tuple[tuple[Any, ...] | None, torch.dtype | None]:
    meta = node.meta
    if "shape" in meta:
        return meta["shape"], meta.get("dtype")
    for key in ("tensor_meta", "val", "example_value"):
        value: Any = meta.get(key)
        if isinstance(getattr(value, "dtype", None), torch.dtype):
            return tuple(value.shape), value.dtype
    return None, None


def _join_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _reason(error: TraceError) -> str:
    return f"{error.why or error.what}" + (f" ({error.where})" if error.where else "")


_OMITTED: frozenset[Callable[..., Any]] = frozenset({check_call, check_parts, check_settings, require})
