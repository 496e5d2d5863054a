"""One run of a forward on a view of its module: every torch function is seen on its way and becomes a node."""

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
from surgery.forward.function_registries import with_leaves
from surgery.tracing.attribute_reads import Reader
from surgery.tracing.call_writer import Calls, CallWriter
from surgery.tracing.example_call import copied
from surgery.tracing.guards import check_call, check_settings, context, structure_of
from surgery.tracing.provenance import Ledger
from surgery.tracing.proxies import is_setting
from surgery.tracing.verification import refusal

__all__ = ["Recorder"]


class Recorder(TorchFunctionMode):
    """One run of the forward, and the graph of it."""

    def __init__(
        self, module: nn.Module, base: type[nn.Module], bound: bool, calls: Calls | None = None, leaves: bool = True
    ):
        super().__init__()
        self.module, self.base = module, base
        self.bound = bound  # whether the graph is for one gradient mode alone
        self.leaves = leaves
        self.checked: set[fx.Node] = set()  # tensors whose rank and dtype the graph checks
        self.ledger = ledger = Ledger(module)
        self.reader = reader = Reader(ledger, self)
        self.writer = writer = CallWriter(ledger, reader, calls)
        # As a `Listener`:
        self.paused, self.real, self.decided, self.path_of = ledger.paused, ledger.real, ledger.decided, ledger.path_of
        self.attribute, self.item = reader.attribute, reader.item
        self.effect, self.call_object = writer.effect, writer.call_object
        self.call_module, self.call_method = writer.call_module, writer.call_method

    def record(self, args: tuple, kwargs: Mapping[str, Any]) -> fx.GraphModule:
        signature = inspect.signature(self.base.forward)
        try:
            given = signature.bind(self.module, *args, **kwargs)
        except TypeError as error:
            raise TraceError(
                f"the example does not fit {self.base.__name__}.forward{signature}",
                why=str(error),
                fix="pass example_inputs as a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error
        root = self.reader.view_of(self.module)
        forward = with_leaves(self.base.forward, self.writer.call_function if self.leaves else self.writer.go_through)
        try:
            positional, named = self.placeholders(signature, given.arguments, kwargs)
            self.writer.note_draws()
            with self:
                output = forward(root, *positional, **named)
            self.writer.check_draws()
            self.reader.check_unchanged()
            self.ledger.graph.output(self.ledger.node(output))
        except Exception as error:
            self.reader.put_back()
            raise refusal(error, self.base) from error
        return self.finished()

    def placeholders(
        self, signature: inspect.Signature, given: Mapping[str, Any], by_name: Mapping[str, Any]
    ) -> tuple[list, dict]:
        """The forward's arguments, in the form of the example: what was not given there is not given here either."""
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
            value = given.get(name, _absent(parameter))
            structure[name] = structure_of(value)
            if name not in given:
                continue
            value = self.received(copied(value), nodes[name])
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

    def received(self, value: Any, node: Any) -> Any:
        """An argument as the forward gets it."""
        if isinstance(value, Tensor):
            if value.is_floating_point() and torch.is_grad_enabled():
                value = value.requires_grad_().clone()  # so that code of the user's own autograd functions shows
            return self.ledger.register(value, node)
        if isinstance(value, torch.Size):
            return self.reader.wrap(value, node)
        if type(value) in (tuple, list):
            return type(value)([self.received(item, self.ledger.lazy(node, index)) for index, item in enumerate(value)])
        if type(value) is dict:
            return {key: self.received(item, self.ledger.lazy(node, key)) for key, item in value.items()}
        if is_setting(value) or isinstance(value, (int, type, types.FunctionType)):
            return value  # part of the structure that is checked
        return self.reader.recorded(value, node)

    def finished(self) -> fx.GraphModule:
        graph, settings = self.ledger.graph, self.reader.settings
        first = next(node for node in graph.nodes if node.op != "placeholder")
        if settings:
            with graph.inserting_before(first):
                itself = graph.get_attr("_surgery_self")
                graph.call_function(check_settings, (itself, tuple(settings.items())))
        for node in reversed(list(graph.nodes)):  # numbers and items that nothing uses
            if not node.users and (node.op == "get_attr" or node.op == "call_function" and node.target in _PURE):
                graph.erase_node(node)
        targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        made = fx.GraphModule({target: self.held(target) for target in targets}, graph, self.base.__name__)
        made.__dict__["_surgery_self"] = self.module  # no child: its parameters are in the graph under their own names
        made.__dict__["training"] = self.module.training
        return made

    def held(self, target: str) -> Any:
        if target == "_surgery_self" or target in self.ledger.keeps:
            return self.ledger.keeps.get(target)
        return operator.attrgetter(target)(self.module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs, ledger = kwargs or {}, self.ledger
        first: Any = args[0] if args else None
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.fact(func, first)
        if name == "__set__":
            return self.assigned(func.__self__.__name__, *args)
        if func is torch._C._set_grad_enabled:
            return func(*args)  # seen by its effect: `in_region`
        if func in _TRUTH:
            if func is Tensor.__bool__ and self.never(first):
                return False
            nodes = (ledger.tensor_node(arg) for arg in args if isinstance(arg, Tensor))
            if not any(node in ledger.activations for node in nodes):
                return ledger.decided(_TRUTH[func], args)  # a mask or token numbers: it says what kind of call this is
        if func is Tensor.item and ledger.tensor_node(first).target == "_is_all_true":
            return ledger.decided(Tensor.item, args)  # `torch._check_tensor_all`: where it fails, so does the forward
        if func in _CONTENT:
            raise TraceError(
                f"the forward decides on the content of a tensor ({name.strip('_')})",
                why="another call may hold other values and would have to decide anew",
            )
        if func is Tensor.size:
            dim = self.real(kwargs.get("dim", args[1] if len(args) > 1 else None))
            return self.shape(first) if dim is None else ledger.size(first, dim)
        if func is Tensor.__len__:
            return ledger.size(first, 0)
        if func in (Tensor.numel, Tensor.nelement):
            return ledger.number(first.numel(), Tensor.numel, (first,))
        if func is Tensor.is_contiguous:  # it may depend on sizes
            return ledger.decided(func, args, kwargs)
        if func in _FACTS:
            if isinstance(first, Tensor) and func is not Tensor.__hash__:
                self.typed(first)
            return func(*self.real(args), **self.real(kwargs))
        if func is Tensor.__setitem__:
            return self.writer.effect(operator.setitem, args)
        function, reflected = _OPERATORS.get(func, (None, False))
        if function is not None and not kwargs:
            return self.writer.call_function(function, args[::-1] if reflected else args, kwargs)
        if getattr(Tensor, name, None) is func or getattr(torch._C.TensorBase, name, None) is func:
            return self.writer.write("call_method", name, args, kwargs, func)
        return self.writer.call_function(func, args, kwargs)

    def fact(self, func: Any, tensor: Tensor) -> Any:
        """A property of a tensor."""
        name = func.__self__.__name__
        node = self.ledger.tensor_node(tensor)
        if name == "shape":
            return self.shape(tensor)
        value = func(tensor)
        if isinstance(value, Tensor):
            return self.reader.wrap(value, self.ledger.graph.call_function(getattr, (node, name)))
        if name in ("dtype", "ndim"):
            self.typed(tensor)
        return value

    def typed(self, tensor: Tensor) -> None:
        """Python goes by rank and dtype. Those of arguments are checked already; the module's own may change."""
        node = self.ledger.tensor_node(tensor)
        if node.op != "placeholder" and node not in self.checked:
            self.checked.add(node)
            self.ledger.guard_parts(tensor, node)

    def shape(self, tensor: Tensor) -> torch.Size:
        return torch.Size([self.ledger.size(tensor, dim) for dim in range(tensor.dim())])  # type: ignore[misc]

    def assigned(self, name: str, tensor: Tensor, value: Any) -> None:
        if name != "requires_grad":
            raise TraceError(f"the forward sets {name} on a tensor")
        if tensor.is_leaf:
            tensor.requires_grad_(value)
        self.ledger.graph.call_method("requires_grad_", (self.ledger.node(tensor), value))

    def never(self, tensor: Tensor) -> bool:
        """`torch.rand(…) < 0.0`: layers dropped with the chance zero. No draw can change it."""
        node = self.ledger.tensor_node(tensor)
        if node.target is not operator.lt:
            return False
        drawn, chance = list(node.args)
        nothing = isinstance(chance, (int, float)) and chance <= 0
        return nothing and isinstance(drawn, fx.Node) and drawn.target in (torch.rand, torch.rand_like)


def _absent(parameter: inspect.Parameter) -> Any:
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
    _plain = getattr(operator, _name if hasattr(operator, _name) else _name + "_")
    for _prefix, _function in {"": _plain, "r": _plain, "i": getattr(operator, "i" + _name)}.items():
        if _method := getattr(Tensor, f"__{_prefix}{_name}__", None):
            _OPERATORS.setdefault(_method, (_function, _prefix == "r"))
for _name in "lt le gt ge eq ne neg invert getitem abs".split():
    _OPERATORS.setdefault(getattr(Tensor, f"__{_name}__"), (getattr(operator, _name), False))
for _name in "add sub mul".split():  # what the operators call, where no alpha is given
    _OPERATORS.setdefault(getattr(Tensor, _name), (getattr(operator, _name), False))
