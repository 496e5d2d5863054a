"""Maps the values of a traced forward to the nodes of its graph.

Every tensor, number and object comes from an argument, a parameter, a setting or a torch function. The ledger records
this origin. It rejects values that the graph cannot reproduce.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import TraceError
from surgery.forward.empty_graph import empty_graph
from surgery.tracing.guards import check_parts, parts_of, require
from surgery.tracing.proxies import RecordedList, RecordedObject, is_setting
from surgery.tracing.tracked_numbers import Number, Real, untracked
from surgery.transaction.user_frames import line_running

__all__ = ["Ledger"]


class Ledger:
    """The graph in progress, and the node of each value of the call."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.graph = empty_graph()
        self.entries: dict[int, tuple[Any, Any]] = {}  # id → (the object, kept alive; its node, or a function for it)
        self.constants: dict[str, Any] = {}  # name of a get_attr → an object that belongs to the graph
        self.clones: dict[int, Any] = {}  # id of an object that the forward created → the copy for real functions
        self.paths = {id(inner): path for path, inner in reversed(list(module.named_modules()))}
        named_tensors = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        self.tensors = {id(tensor): name for name, tensor in reversed(named_tensors)}
        self.values: dict[fx.Node, Any] = {}  # node → the number that the forward read from the module
        self.numbers: dict[Any, fx.Node] = {}  # a computation on numbers → its node
        self.activations: set[fx.Node] = set()  # nodes of activations, parameters or random numbers
        self.shared: dict[int, fx.Node] = {}  # id of a tensor → the node that wrote to its memory by another tensor
        self.by_content: set[fx.Node] = set()  # nodes whose sizes depend on the content of tensors
        self.without_gradients: set[fx.Node] = set()  # nodes that ran in the forward's own torch.no_grad

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the recording of torch functions."""
        with torch._C.DisableTorchFunction():
            yield

    # Values → nodes -----------------------------------------------------------------------------------------

    def node(self, value: Any) -> Any:
        """Convert a value to an argument of a node."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self.tensor_node(value)
        if kind in (Number, Real):
            return self.number_node(value)
        if kind in _RECORDED:
            return value._node
        if isinstance(value, nn.Module):
            return self.graph.get_attr(self.path_of(value) or "_surgery_self")
        if isinstance(value, slice):
            return slice(self.node(value.start), self.node(value.stop), self.node(value.step))
        if isinstance(value, tuple):
            items = tuple([self.node(item) for item in value])
            return self.graph.call_function(kind, items) if hasattr(value, "_fields") else items
        if kind is list:
            return [self.node(item) for item in value]
        if kind is dict:
            return {key: self.node(item) for key, item in value.items()}
        if isinstance(value, (dict, set)) or hasattr(value, "__dataclass_fields__"):
            return self.structure_node(value)
        if isinstance(value, torch.device):
            return str(value)  # in generated code, a parameter named `device` would hide the class
        if isinstance(value, float) and kind is not float:
            return float(value)  # a float of numpy
        if value is None or isinstance(value, _CONSTANT):
            return value
        return self.object_node(value)

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        entry = self.entries.get(id(tensor))
        name = self.tensors.get(id(tensor))
        if entry is None and name is None:
            raise TraceError(
                "the forward uses a tensor that comes from nowhere a graph could get it again",
                why=f"of shape {tuple(tensor.shape)}; no argument, parameter or buffer, and made by no torch function",
            )
        node = self.resolve(entry[1]) if entry is not None else self.graph.get_attr(str(name))
        if (writer := self.shared.get(id(tensor))) is not None:
            writer.meta["viewed"] = True
        self.entries[id(tensor)] = (tensor, node)
        if "shape" not in node.meta:
            with self.paused():
                node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
        if tensor.is_floating_point() and (node.op in _SOURCE_OPS or node.target in (getattr, operator.getitem)):
            self.activations.add(node)
        if tensor.requires_grad and node in self.without_gradients:
            raise TraceError("the forward calls an autograd function of its own, whose backward a graph would lose")
        return node

    def path_of(self, module: nn.Module) -> str:
        real = self.real(module)
        if id(real) not in self.paths:
            raise TraceError(f"the forward uses a {type(real).__name__} that is not a child of the module")
        return self.paths[id(real)]

    def resolve(self, node: Any) -> fx.Node:
        return node if isinstance(node, fx.Node) else node()

    def structure_node(self, value: Any) -> fx.Node:
        """Returns the node that creates a container of a special class, such as a ModelOutput."""
        kind = type(value)
        if hasattr(value, "__dataclass_fields__"):
            fields = {name: getattr(value, name) for name, field in value.__dataclass_fields__.items() if field.init}
            field_nodes = {name: self.node(item) for name, item in fields.items() if item is not None}
            extra = {key: item for key, item in value.items() if key not in fields} if isinstance(value, dict) else {}
            items = [(key, self.node(item)) for key, item in extra.items()]
            node = self.graph.call_function(kind, (), field_nodes)
            for key, item in items:
                self.graph.call_function(operator.setitem, (node, key, item))
            return node
        if isinstance(value, dict):
            return self.graph.call_function(kind, ({key: self.node(item) for key, item in value.items()},))
        raise TraceError(f"a {kind.__name__} can't be held in a graph")

    def object_node(self, value: Any) -> Any:
        """Returns the node of an object that the forward created and passes on, such as a new KV cache."""
        if callable(value):
            return value
        if id(value) in self.entries:
            return self.resolve(self.entries[id(value)][1])
        if self.contains_tensors(value):
            raise TraceError(f"the forward hands on a {type(value).__name__} that holds tensors of this call")
        node = self.graph.call_function(_Template.new, (self.keep(_Template(copy.deepcopy(value))),))
        self.register(value, node)
        # Calls get a copy, so the forward's own object becomes stale. If the forward reads it later, the graph's result
        # differs from the forward's result, and the final comparison rejects the graph.
        self.clones[id(value)] = copy.deepcopy(value)
        return node

    def keep(self, value: Any) -> fx.Node:
        """Store an object in the graph. Returns the node that reads it."""
        name = f"_kept_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.get_attr(name)

    def contains_tensors(self, value: Any, depth: int = 0) -> bool:
        """Whether an object contains tensors that each call computes."""
        if isinstance(value, Tensor):
            return not self.is_constant(self.tensor_node(value))
        if type(value) in (Number, Real) or depth > 6:
            return False  # numbers are copied as plain ones, with a guard
        if type(value) in _RECORDED:
            return value._settled is None
        items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        if hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            items = (*items, *vars(value).values())
        return any(self.contains_tensors(item, depth + 1) for item in items)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a tensor comes only from numbers and settings. The graph then checks that these do not change."""
        if node in self.values:
            self.guard(node, self.values[node])
            return True
        if node.op != "call_function" or node in self.activations:
            return False
        return all(self.is_constant(source) for source in node.all_input_nodes)

    # Numbers and guards -------------------------------------------------------------------------------------

    def number(self, value: Any, function: Callable[..., Any], args: tuple) -> Any:
        """Returns a tracked number. Its node is created at its first use."""
        if type(value) is bool or not isinstance(value, (int, float)):
            return value
        kind: Any = Number if isinstance(value, int) else Real
        return kind(self, value, (function, args))

    def number_node(self, number: Number | Real) -> fx.Node:
        if not isinstance(number.node, fx.Node):
            function, args = number.node
            if function is _size:
                shape = self.shared_node(getattr, (self.node(args[0]), "shape"))
                number.node = self.shared_node(operator.getitem, (shape, args[1]))
            else:
                number.node = self.shared_node(function, self.node(args))
        return number.node

    def shared_node(self, function: Any, args: tuple) -> fx.Node:
        """Returns the node of a computation on numbers. Equal computations share a node."""
        key = (function, *(id(arg) if isinstance(arg, fx.Node) else (type(arg), arg) for arg in args))
        if key not in self.numbers:
            node = self.numbers[key] = self.graph.call_function(function, args)
            if any(source in self.by_content for source in node.all_input_nodes):
                self.by_content.add(node)
        return self.numbers[key]

    def guard_number(self, function: Any, args: tuple, value: Any) -> None:
        """Add a check that a decision on numbers has the same result, once for each decision."""
        nodes = self.node(args)
        if any(node in self.by_content for node in nodes if isinstance(node, fx.Node)):
            raise TraceError("the forward decides on a size that depends on the content of a tensor")
        decision = nodes[0] if function is None else self.shared_node(function, nodes)
        key = (require, decision)
        if key not in self.numbers:
            self.numbers[key] = self.guard(decision, value)

    def decide(self, function: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        """Returns the result of a decision of Python on an object or a mask, and adds a check of it."""
        kwargs = kwargs or {}
        with self.paused():
            value = function(*self.real(args), **self.real(kwargs))
        if not isinstance(value, int) and not is_setting(value):
            raise TraceError("the forward iterates over values that can't be compared with those of another call")
        op, target = "call_function", function
        if isinstance(function, types.MethodDescriptorType):
            op, target = "call_method", function.__name__
        self.guard(self.graph.create_node(op, target, self.node(args), self.node(kwargs)), value)
        return value

    def guard(self, node: fx.Node, value: Any) -> fx.Node:
        return self.graph.call_function(require, (node, value, line_running()))

    def guard_parts(self, value: Any, node: fx.Node, deep: bool = False) -> None:
        with self.paused():
            parts = parts_of(value, deep)
        self.graph.call_function(check_parts, (node, parts, line_running(), deep))

    def size(self, tensor: Tensor, dim: int) -> Any:
        return self.number(tensor.shape[dim], _size, (tensor, dim))

    # Nodes → values -----------------------------------------------------------------------------------------

    def register(self, value: Any, node: Any) -> Any:
        self.entries[id(value)] = (value, node)
        return value

    def lazy(self, node: Any, key: Any) -> Callable[[], fx.Node]:
        return lambda: self.graph.call_function(operator.getitem, (self.resolve(node), key))

    def real(self, value: Any) -> Any:
        """Convert a value to the form for real functions: views and proxies become the real objects."""
        kind: Any = type(value)
        if kind in (Number, Real):
            return value.value
        if kind in _RECORDED:
            return value._real
        if isinstance(value, nn.Module):
            return object.__getattribute__(value, "__dict__").get("_surgery_real", value)
        if kind is torch.Size:
            return torch.Size([untracked(item) for item in value])
        if kind is slice:
            return slice(self.real(value.start), self.real(value.stop), self.real(value.step))
        if kind is dict:
            return {key: self.real(item) for key, item in value.items()}
        if isinstance(value, tuple) or kind is list:
            items = [self.real(item) for item in value]
            return kind(*items) if hasattr(value, "_fields") else kind(items)
        return self.clones.get(id(value), value)


class _Template:
    """A new object of the traced call; each call gets a copy."""

    def __init__(self, value: Any):
        self.value = value

    def new(self) -> Any:
        return copy.deepcopy(self.value)


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim]


_RECORDED = (RecordedObject, RecordedList)
_SOURCE_OPS = ("placeholder", "get_attr")
_CONSTANT = (bool, int, float, str, complex, torch.dtype, torch.memory_format, torch.layout, type(...), range)
