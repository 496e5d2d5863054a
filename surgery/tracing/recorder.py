"""Runs a forward on a view of its module, and records every torch function as a node."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from surgery.errors import TraceError
from surgery.tracing.attribute_reads import Reader
from surgery.tracing.call_writer import Calls, CallWriter
from surgery.tracing.depth import LAYERS, Depth
from surgery.tracing.guards import check_call, check_settings, context, structure_of
from surgery.tracing.provenance import Ledger
from surgery.tracing.proxies import is_setting
from surgery.tracing.verification import trace_error
from surgery.transaction.object_contents import copied

__all__ = ["Recorder"]


class Recorder(TorchFunctionMode):
    """One run of a forward, which writes its graph."""

    def __init__(
        self,
        module: nn.Module,
        base: type[nn.Module],
        bound: bool,
        calls: Calls | None = None,
        depth: Depth = LAYERS,
    ):
        super().__init__()
        self.module, self.base = module, base
        self.bound = bound  # whether the graph is only for the present gradient mode
        self.checked: set[fx.Node] = set()  # tensors whose rank and dtype the graph checks
        self.ledger = ledger = Ledger(module)
        self.reader = reader = Reader(ledger, self)
        self.writer = writer = CallWriter(ledger, reader, calls, depth)
        # The methods of `Listener`:
        self.paused, self.real, self.decide, self.path_of = ledger.paused, ledger.real, ledger.decide, ledger.path_of
        self.read_attribute, self.read_item = reader.read_attribute, reader.read_item
        self.write_to, self.call_object = writer.write_to, writer.call_object
        self.call_module, self.call_method = writer.call_module, writer.call_method

    def record(self, args: tuple, kwargs: Mapping[str, Any]) -> fx.GraphModule:
        """Run the forward. Returns its graph; raises `TraceError` if the graph can't be written."""
        signature = inspect.signature(self.base.forward)
        try:
            call = signature.bind(self.module, *args, **kwargs)
        except TypeError as error:
            raise TraceError(
                f"the example does not fit {self.base.__name__}.forward{signature}",
                why=str(error),
                fix="pass example_inputs as a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error
        root = self.reader.view_of(self.module)
        forward = self.writer.forward_of(self.base)
        try:
            positional, named = self.add_placeholders(signature, call.arguments, kwargs)
            self.writer.note_draws()
            with self:
                output = forward(root, *positional, **named)
            self.writer.check_draws()
            self.reader.check_unchanged()
            self.ledger.graph.output(self.ledger.node(output))
        except Exception as error:
            self.reader.restore_settings()
            raise trace_error(error, self.base) from error
        return self.build_module()

    def add_placeholders(
        self, signature: inspect.Signature, arguments: Mapping[str, Any], by_name: Mapping[str, Any]
    ) -> tuple[list, dict]:
        """Add the graph's inputs. Returns the forward's arguments as in the example, without those that it omits."""
        parameters = list(signature.parameters.values())[1:]
        nodes: dict[str, fx.Node] = {}
        for parameter in parameters:
            star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            default = () if parameter.default is parameter.empty else (parameter.default,)
            nodes[parameter.name] = self.ledger.graph.placeholder(star + parameter.name, None, *default)
        structure: dict[str, Any] = {}
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in parameters:
            name = parameter.name
            value = arguments.get(name, _default_of(parameter))
            structure[name] = structure_of(value)
            if name not in arguments:
                continue
            value = self.wrap_argument(copied(value), nodes[name])
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                named.update(value)
            elif name in by_name:
                named[name] = value
            else:
                positional.append(value)
        self.ledger.graph.call_function(check_call, (context(self.bound), structure, dict(nodes)))
        return positional, named

    def wrap_argument(self, value: Any, node: Any) -> Any:
        """Returns an argument as the forward sees it."""
        if isinstance(value, Tensor):
            if value.is_floating_point() and torch.is_grad_enabled():
                value = value.requires_grad_().clone()  # makes autograd functions of the user visible
            return self.ledger.register(value, node)
        if isinstance(value, torch.Size):
            return self.reader.wrap(value, node)
        if type(value) in (tuple, list):
            items = [self.wrap_argument(item, self.ledger.lazy(node, index)) for index, item in enumerate(value)]
            return type(value)(items)
        if type(value) is dict:
            return {key: self.wrap_argument(item, self.ledger.lazy(node, key)) for key, item in value.items()}
        if is_setting(value) or isinstance(value, (int, type, types.FunctionType)):
            return value  # `check_call` checks it as part of the structure
        return self.reader.record_object(value, node)

    def build_module(self) -> fx.GraphModule:
        """Returns the graph as a module: adds the check of settings, and removes unused nodes."""
        graph, settings = self.ledger.graph, self.reader.settings
        first = next(node for node in graph.nodes if node.op != "placeholder")
        if settings:
            with graph.inserting_before(first):
                itself = graph.get_attr("_surgery_self")
                graph.call_function(check_settings, (itself, tuple(settings.items())))
        for node in reversed(list(graph.nodes)):  # removes unused numbers and items
            if not node.users and (node.op == "get_attr" or node.op == "call_function" and node.target in _PURE):
                graph.erase_node(node)
        targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        built = fx.GraphModule({target: self.object_at(target) for target in targets}, graph, self.base.__name__)
        # Not a child, because the graph already has the module's parameters under their own names.
        built.__dict__["_surgery_self"] = self.module
        built.__dict__["training"] = self.module.training
        return built

    def object_at(self, target: str) -> Any:
        """Returns the object for a get_attr or call_module target of the graph."""
        if target == "_surgery_self" or target in self.ledger.constants:
            return self.ledger.constants.get(target)
        return operator.attrgetter(target)(self.module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs, ledger = kwargs or {}, self.ledger
        first: Any = args[0] if args else None
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.read_property(func, first)
        if name == "__set__":
            return self.set_property(func.__self__.__name__, *args)
        if func is torch._C._set_grad_enabled:
            return func(*args)  # the nodes of calls in this mode are `in_region`
        if func in _TRUTH:
            if func is Tensor.__bool__ and self.is_impossible(first):
                return False
            nodes = (ledger.tensor_node(arg) for arg in args if isinstance(arg, Tensor))
            if not any(node in ledger.activations for node in nodes):
                return ledger.decide(_TRUTH[func], args)  # a mask or token ids, which belong to the kind of the call
        if func is Tensor.item and ledger.tensor_node(first).target == "_is_all_true":
            return ledger.decide(Tensor.item, args)  # `torch._check_tensor_all` raises in the forward, too, if false
        if func in _CONTENT:
            raise TraceError(
                f"the forward decides on the content of a tensor ({name.strip('_')})",
                why="another call may hold other values and would have to decide anew",
            )
        if func is Tensor.size:
            dim = self.real(kwargs.get("dim", args[1] if len(args) > 1 else None))
            return self.shape_of(first) if dim is None else ledger.size(first, dim)
        if func is Tensor.__len__:
            return ledger.size(first, 0)
        if func in (Tensor.numel, Tensor.nelement):
            return ledger.number(first.numel(), Tensor.numel, (first,))
        if func is Tensor.is_contiguous:  # it may depend on sizes
            return ledger.decide(func, args, kwargs)
        if func in _FACTS:
            if isinstance(first, Tensor) and func is not Tensor.__hash__:
                self.guard_type(first)
            return func(*self.real(args), **self.real(kwargs))
        if func is Tensor.__setitem__:
            return self.writer.write_to(operator.setitem, args)
        function, reflected = _OPERATORS.get(func, (None, False))
        if function is not None and not kwargs:
            return self.writer.call_function(function, args[::-1] if reflected else args, kwargs)
        if getattr(Tensor, name, None) is func or getattr(torch._C.TensorBase, name, None) is func:
            return self.writer.write("call_method", name, args, kwargs, func)
        return self.writer.call_function(func, args, kwargs)

    def read_property(self, func: Any, tensor: Tensor) -> Any:
        """Returns a property of a tensor as the forward sees it."""
        name = func.__self__.__name__
        node = self.ledger.tensor_node(tensor)
        if name == "shape":
            return self.shape_of(tensor)
        value = func(tensor)
        if isinstance(value, Tensor):
            return self.reader.wrap(value, self.ledger.graph.call_function(getattr, (node, name)))
        if name in ("dtype", "ndim"):
            self.guard_type(tensor)
        return value

    def guard_type(self, tensor: Tensor) -> None:
        """Add a check of a tensor's rank and dtype. Those of arguments are already checked by `check_call`."""
        node = self.ledger.tensor_node(tensor)
        if node.op != "placeholder" and node not in self.checked:
            self.checked.add(node)
            self.ledger.guard_parts(tensor, node)

    def shape_of(self, tensor: Tensor) -> torch.Size:
        return torch.Size([self.ledger.size(tensor, dim) for dim in range(tensor.dim())])  # type: ignore[misc]

    def set_property(self, name: str, tensor: Tensor, value: Any) -> None:
        """Record that the forward sets `requires_grad`. Raises `TraceError` for other properties."""
        if name != "requires_grad":
            raise TraceError(f"the forward sets {name} on a tensor")
        if tensor.is_leaf:
            tensor.requires_grad_(value)
        self.ledger.graph.call_method("requires_grad_", (self.ledger.node(tensor), value))

    def is_impossible(self, tensor: Tensor) -> bool:
        """Whether a tensor is `torch.rand(…) < 0.0`, as in layer dropout with probability 0: always false."""
        node = self.ledger.tensor_node(tensor)
        if node.target is not operator.lt:
            return False
        draw, probability = list(node.args)
        zero = isinstance(probability, (int, float)) and probability <= 0
        return zero and isinstance(draw, fx.Node) and draw.target in (torch.rand, torch.rand_like)


def _default_of(parameter: inspect.Parameter) -> Any:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return ()
    return {} if parameter.kind is parameter.VAR_KEYWORD else parameter.default


_PURE = frozenset({getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
                   operator.truediv, operator.mod, operator.neg, Tensor.numel})  # fmt: skip
_TRUTH = {Tensor.__bool__: operator.truth, Tensor.__contains__: operator.contains}
_CONTENT = frozenset({
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__contains__, Tensor.numpy, Tensor.__array__, Tensor.is_nonzero, torch.is_nonzero, Tensor.data_ptr,
    torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
})  # fmt: skip
_FACTS = frozenset({
    Tensor.dim, Tensor.ndimension, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex,
    torch.is_complex, Tensor.element_size, Tensor.get_device, Tensor.is_signed, torch.is_tensor, torch.result_type,
    Tensor.__hash__, Tensor.__repr__, Tensor.__format__,
})  # fmt: skip
_OPERATORS: dict[Any, tuple[Callable[..., Any], bool]] = {}
for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _binary = getattr(operator, _name if hasattr(operator, _name) else _name + "_")
    for _prefix, _function in {"": _binary, "r": _binary, "i": getattr(operator, "i" + _name)}.items():
        if _method := getattr(Tensor, f"__{_prefix}{_name}__", None):
            _OPERATORS.setdefault(_method, (_function, _prefix == "r"))
for _name in "lt le gt ge eq ne neg invert getitem abs".split():
    _OPERATORS.setdefault(getattr(Tensor, f"__{_name}__"), (getattr(operator, _name), False))
for _name in "add sub mul".split():  # without alpha, these methods are the operators
    _OPERATORS.setdefault(getattr(Tensor, _name), (getattr(operator, _name), False))
