"""While a forward is traced by values: which value is which node of the graph, and how each is got again.

Every tensor, number and object that the forward holds came from somewhere: an argument, a parameter, a setting, a
torch function. The ledger knows from where, and refuses what came from nowhere a graph could get it again.
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
from surgery.tracing.guards import check_parts, parts_of, require
from surgery.tracing.proxies import Recorded, RecordedList, is_setting
from surgery.tracing.tracked_numbers import Number, Real, plain
from surgery.transaction.user_frames import line_running

__all__ = ["Ledger"]


class Ledger:
    """The graph being written, and what each value of the call is in it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.graph = fx.Graph()
        self.known: dict[int, tuple[Any, Any]] = {}  # id → (the object, kept alive; its node, or how to make one)
        self.keeps: dict[str, Any] = {}  # objects that the graph keeps, by the name of their get_attr
        self.clones: dict[int, Any] = {}  # what the real functions get in the place of objects the forward made
        self.paths = {id(inner): path for path, inner in reversed(list(module.named_modules()))}
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        self.tensors = {id(tensor): name for name, tensor in reversed(named)}
        self.values: dict[fx.Node, Any] = {}  # numbers that were read from the module
        self.numbers: dict[Any, fx.Node] = {}  # one node for equal computations on numbers
        self.activations: set[fx.Node] = set()  # nodes that hold activations, parameters or random draws
        self.shared: dict[int, fx.Node] = {}  # tensors whose memory an operation wrote to through another one
        self.by_content: set[fx.Node] = set()  # nodes whose sizes depend on the content of tensors
        self.without_gradients: set[fx.Node] = set()  # nodes that ran in a torch.no_grad of the forward's own

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is seen meanwhile."""
        with torch._C.DisableTorchFunction():
            yield

    # Values → nodes -----------------------------------------------------------------------------------------

    def node(self, value: Any) -> Any:
        """A value as an argument of a node."""
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
            return str(value)  # in generated code a parameter called `device` would hide the class
        if isinstance(value, float) and kind is not float:
            return float(value)  # numpy's
        if value is None or isinstance(value, _CONSTANT):
            return value
        return self.object_node(value)

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        found = self.known.get(id(tensor))
        name = self.tensors.get(id(tensor))
        if found is None and name is None:
            raise TraceError(
                "the forward uses a tensor that comes from nowhere a graph could get it again",
                why=f"of shape {tuple(tensor.shape)}; no argument, parameter or buffer, and made by no torch function",
            )
        node = self.resolve(found[1]) if found is not None else self.graph.get_attr(str(name))
        if (writer := self.shared.get(id(tensor))) is not None:
            writer.meta["viewed"] = True
        self.known[id(tensor)] = (tensor, node)
        if "shape" not in node.meta:
            with self.paused():
                node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
        if tensor.is_floating_point() and (node.op in _GIVEN or node.target in (getattr, operator.getitem)):
            self.activations.add(node)
        if tensor.requires_grad and node in self.without_gradients:
            raise TraceError("the forward calls an autograd function of its own, whose backward a graph would lose")
        return node

    def path_of(self, module: nn.Module) -> str:
        real = self.real(module)
        if id(real) not in self.paths:
            raise TraceError(f"the forward uses a {type(real).__name__} that is no child of the module")
        return self.paths[id(real)]

    def resolve(self, node: Any) -> fx.Node:
        return node if isinstance(node, fx.Node) else node()

    def structure_node(self, value: Any) -> fx.Node:
        """A container of a class of its own (a ModelOutput), made anew in the graph."""
        kind = type(value)
        if hasattr(value, "__dataclass_fields__"):
            fields = {name: getattr(value, name) for name, field in value.__dataclass_fields__.items() if field.init}
            kept = {name: self.node(item) for name, item in fields.items() if item is not None}
            added = {key: item for key, item in value.items() if key not in fields} if isinstance(value, dict) else {}
            items = [(key, self.node(item)) for key, item in added.items()]
            node = self.graph.call_function(kind, (), kept)
            for key, item in items:
                self.graph.call_function(operator.setitem, (node, key, item))
            return node
        if isinstance(value, dict):
            return self.graph.call_function(kind, ({key: self.node(item) for key, item in value.items()},))
        raise TraceError(f"a {kind.__name__} can't be held in a graph")

    def object_node(self, value: Any) -> Any:
        """An object that the forward made itself and hands on, such as a new KV cache."""
        if callable(value):
            return value
        if id(value) in self.known:
            return self.resolve(self.known[id(value)][1])
        if self.holds_tensors(value):
            raise TraceError(f"the forward hands on a {type(value).__name__} that holds tensors of this call")
        node = self.graph.call_function(_Template.new, (self.kept(_Template(copy.deepcopy(value))),))
        self.register(value, node)
        # What is called with it works on a copy. The forward's own goes stale, so that reading it later gives a graph
        # with another result than the forward's, and that is found.
        self.clones[id(value)] = copy.deepcopy(value)
        return node

    def kept(self, value: Any) -> fx.Node:
        """An object that the graph keeps."""
        name = f"_kept_{len(self.keeps)}"
        self.keeps[name] = value
        return self.graph.get_attr(name)

    def holds_tensors(self, value: Any, depth: int = 0) -> bool:
        if isinstance(value, Tensor):
            return not self.is_constant(self.tensor_node(value))
        if type(value) in (Number, Real) or depth > 6:
            return False  # numbers are copied as plain ones, with a guard
        if type(value) in _RECORDED:
            return value._settled is None
        items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        if hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            items = (*items, *vars(value).values())
        return any(self.holds_tensors(item, depth + 1) for item in items)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a tensor comes from numbers and settings alone, which are then required to stay what they are."""
        if node in self.values:
            self.guard(node, self.values[node])
            return True
        if node.op != "call_function" or node in self.activations:
            return False
        return all(self.is_constant(source) for source in node.all_input_nodes)

    # Numbers and guards -------------------------------------------------------------------------------------

    def number(self, value: Any, function: Callable[..., Any], args: tuple) -> Any:
        """A tracked number; the node that computes it is made once something needs it."""
        if type(value) is bool or not isinstance(value, (int, float)):
            return value
        kind: Any = Number if isinstance(value, int) else Real
        return kind(self, value, (function, args))

    def number_node(self, number: Number | Real) -> fx.Node:
        if not isinstance(number.node, fx.Node):
            function, args = number.node
            if function is _size:
                shape = self.one_node(getattr, (self.node(args[0]), "shape"))
                number.node = self.one_node(operator.getitem, (shape, args[1]))
            else:
                number.node = self.one_node(function, self.node(args))
        return number.node

    def one_node(self, function: Any, args: tuple) -> fx.Node:
        """The node of a computation on numbers, the same one for equal computations."""
        key = (function, *(id(arg) if isinstance(arg, fx.Node) else (type(arg), arg) for arg in args))
        if key not in self.numbers:
            node = self.numbers[key] = self.graph.call_function(function, args)
            if any(source in self.by_content for source in node.all_input_nodes):
                self.by_content.add(node)
        return self.numbers[key]

    def guard_number(self, function: Any, args: tuple, value: Any) -> None:
        nodes = self.node(args)
        if any(node in self.by_content for node in nodes if isinstance(node, fx.Node)):
            raise TraceError("the forward decides on a size that depends on the content of a tensor")
        decided = nodes[0] if function is None else self.one_node(function, nodes)
        key = (require, decided)
        if key not in self.numbers:
            self.numbers[key] = self.guard(decided, value)

    def decided(self, function: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        """What Python decides on an object or a mask, and a guard that it would again."""
        kwargs = kwargs or {}
        with self.paused():
            value = function(*self.real(args), **self.real(kwargs))
        if not isinstance(value, int) and not is_setting(value):
            raise TraceError("the forward goes through what can't be compared with that of another call")
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
        self.known[id(value)] = (value, node)
        return value

    def lazy(self, node: Any, key: Any) -> Callable[[], fx.Node]:
        return lambda: self.graph.call_function(operator.getitem, (self.resolve(node), key))

    def real(self, value: Any) -> Any:
        """A value as the real functions get it."""
        kind: Any = type(value)
        if kind in (Number, Real):
            return value.value
        if kind in _RECORDED:
            return value._real
        if isinstance(value, nn.Module):
            return object.__getattribute__(value, "__dict__").get("_surgery_real", value)
        if kind is torch.Size:
            return torch.Size([plain(item) for item in value])
        if kind is slice:
            return slice(self.real(value.start), self.real(value.stop), self.real(value.step))
        if kind is dict:
            return {key: self.real(item) for key, item in value.items()}
        if isinstance(value, tuple) or kind is list:
            items = [self.real(item) for item in value]
            return kind(*items) if hasattr(value, "_fields") else kind(items)
        return self.clones.get(id(value), value)


class _Template:
    """An object as it was when it was new, copied for each call."""

    def __init__(self, value: Any):
        self.value = value

    def new(self) -> Any:
        return copy.deepcopy(self.value)


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim]


_RECORDED = (Recorded, RecordedList)
_GIVEN = ("placeholder", "get_attr")
_CONSTANT = (bool, int, float, str, complex, torch.dtype, torch.memory_format, torch.layout, type(...), range)
