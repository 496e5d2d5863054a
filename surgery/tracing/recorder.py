"""One run of a forward on a view of its module: every torch function is seen on its way and becomes a node."""

from __future__ import annotations

import inspect
import operator
import random
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from surgery.errors import TraceError
from surgery.forward.function_registries import with_leaves
from surgery.tracing.attribute_reads import Reader
from surgery.tracing.example_call import copied
from surgery.tracing.guards import check_call, check_settings, context, in_region, structure_of
from surgery.tracing.proxies import Recorded, RecordedList, call_object, is_setting
from surgery.tracing.verification import refusal

__all__ = ["Calls", "Recorder"]

# Calls of children: the node, the child, copies of the arguments.
Calls = list[tuple[fx.Node, nn.Module, tuple, dict[str, Any]]]


class Recorder(Reader, TorchFunctionMode):
    """One run of the forward, and the graph of it."""

    def __init__(self, module: nn.Module, base: type[nn.Module], bound: bool):
        Reader.__init__(self, module)
        TorchFunctionMode.__init__(self)
        self.base = base
        self.bound = bound  # whether the graph is for one gradient mode alone
        self.region = context(True)
        self.without_gradients: set[fx.Node] = set()
        self.checked: set[fx.Node] = set()  # tensors whose rank and dtype the graph checks
        self.drawn: tuple = ()
        self.calls: Calls | None = None
        self.leaves = True

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
        root = self.view_of(self.module)
        forward = with_leaves(self.base.forward, self.call_function if self.leaves else self.go_through)
        try:
            positional, named = self.placeholders(signature, given.arguments, kwargs)
            self.drawn = _outside()
            with self:
                output = forward(root, *positional, **named)
            self.check_draws()
            self.check_unchanged()
            self.graph.output(self.node(output))
        except Exception as error:
            self.put_back()
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
            nodes[parameter.name] = self.graph.placeholder(star + parameter.name, None, *default)
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
        self.graph.call_function(check_call, (context(self.bound), structure, dict(nodes)))
        return positional, named

    def received(self, value: Any, node: Any) -> Any:
        """An argument as the forward gets it."""
        if isinstance(value, Tensor):
            if value.is_floating_point() and torch.is_grad_enabled():
                value = value.requires_grad_().clone()  # so that code of the user's own autograd functions shows
            return self.register(value, node)
        if isinstance(value, torch.Size):
            return self.wrap(value, node)
        if type(value) in (tuple, list):
            return type(value)([self.received(item, self.lazy(node, index)) for index, item in enumerate(value)])
        if type(value) is dict:
            return {key: self.received(item, self.lazy(node, key)) for key, item in value.items()}
        if is_setting(value) or isinstance(value, (int, type, types.FunctionType)):
            return value  # part of the structure that is checked
        return self.recorded(value, node)

    def finished(self) -> fx.GraphModule:
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        if self.settings:
            with self.graph.inserting_before(first):
                itself = self.graph.get_attr("_surgery_self")
                self.graph.call_function(check_settings, (itself, tuple(self.settings.items())))
        for node in reversed(list(self.graph.nodes)):  # numbers and items that nothing uses
            if not node.users and (node.op == "get_attr" or node.op == "call_function" and node.target in _PURE):
                self.graph.erase_node(node)
        targets = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        made = fx.GraphModule({target: self.held(target) for target in targets}, self.graph, self.base.__name__)
        made.__dict__["_surgery_self"] = self.module  # no child: its parameters are in the graph under their own names
        made.__dict__["training"] = self.module.training
        return made

    def held(self, target: str) -> Any:
        if target == "_surgery_self" or target in self.keeps:
            return self.keeps.get(target)
        return operator.attrgetter(target)(self.module)

    # What is seen -------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
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
            if not any(self.tensor_node(arg) in self.activations for arg in args if isinstance(arg, Tensor)):
                return self.decided(_TRUTH[func], args)  # a mask or token numbers: it says what kind of call this is
        if func is Tensor.item and self.tensor_node(first).target == "_is_all_true":
            return self.decided(Tensor.item, args)  # `torch._check_tensor_all`: where it fails, so does the forward
        if func in _CONTENT:
            raise TraceError(
                f"the forward decides on the content of a tensor ({name.strip('_')})",
                why="another call may hold other values and would have to decide anew",
            )
        if func is Tensor.size:
            dim = self.real(kwargs.get("dim", args[1] if len(args) > 1 else None))
            return self.shape(first) if dim is None else self.size(first, dim)
        if func is Tensor.__len__:
            return self.size(first, 0)
        if func in (Tensor.numel, Tensor.nelement):
            return self.number(first.numel(), Tensor.numel, (first,))
        if func is Tensor.is_contiguous:  # it may depend on sizes
            return self.decided(func, args, kwargs)
        if func in _FACTS:
            if isinstance(first, Tensor) and func is not Tensor.__hash__:
                self.typed(first)
            return func(*self.real(args), **self.real(kwargs))
        if func is Tensor.__setitem__:
            return self.effect(operator.setitem, args)
        function, reflected = _OPERATORS.get(func, (None, False))
        if function is not None and not kwargs:
            return self.call_function(function, args[::-1] if reflected else args, kwargs)
        if getattr(Tensor, name, None) is func or getattr(torch._C.TensorBase, name, None) is func:
            return self.made("call_method", name, args, kwargs, func)
        return self.call_function(func, args, kwargs)

    def fact(self, func: Any, tensor: Tensor) -> Any:
        """A property of a tensor."""
        name = func.__self__.__name__
        node = self.tensor_node(tensor)
        if name == "shape":
            return self.shape(tensor)
        value = func(tensor)
        if isinstance(value, Tensor):
            return self.wrap(value, self.graph.call_function(getattr, (node, name)))
        if name in ("dtype", "ndim"):
            self.typed(tensor)
        return value

    def typed(self, tensor: Tensor) -> None:
        """Python goes by rank and dtype. Those of arguments are checked already; the module's own may change."""
        node = self.tensor_node(tensor)
        if node.op != "placeholder" and node not in self.checked:
            self.checked.add(node)
            self.guard_parts(tensor, node)

    def shape(self, tensor: Tensor) -> torch.Size:
        return torch.Size([self.size(tensor, dim) for dim in range(tensor.dim())])  # type: ignore[misc]

    def assigned(self, name: str, tensor: Tensor, value: Any) -> None:
        if name != "requires_grad":
            raise TraceError(f"the forward sets {name} on a tensor")
        if tensor.is_leaf:
            tensor.requires_grad_(value)
        self.graph.call_method("requires_grad_", (self.node(tensor), value))

    def never(self, tensor: Tensor) -> bool:
        """`torch.rand(…) < 0.0`: layers dropped with the chance zero. No draw can change it."""
        node = self.tensor_node(tensor)
        if node.target is not operator.lt:
            return False
        drawn, chance = list(node.args)
        nothing = isinstance(chance, (int, float)) and chance <= 0
        return nothing and isinstance(drawn, fx.Node) and drawn.target in (torch.rand, torch.rand_like)

    # What is written ----------------------------------------------------------------------------------------

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        node = super().tensor_node(tensor)
        if tensor.requires_grad and node in self.without_gradients:
            raise TraceError("the forward calls an autograd function of its own, whose backward a graph would lose")
        return node

    def made(
        self, op: str, target: Any, args: tuple, kwargs: dict, run: Callable[..., Any], foreign: bool = False
    ) -> Any:
        """One node, run for its value. `foreign`: an object of the user's gives it."""
        nodes = self.node(args), self.node(kwargs)  # before the real ones: what is handed on is copied here
        given, named = self.real(args), self.real(kwargs)
        with self.paused():
            versions = _versions((given, named))
            value = run(*given, **named)
        region, called = context(True), target
        if region != self.region:
            if op == "call_module":
                raise TraceError("the forward calls a child under torch.no_grad or torch.autocast of its own")
            function = target if isinstance(target, str) else self.kept(target)
            op, target, nodes = "call_function", in_region, ((region, function, *nodes[0]), nodes[1])
        if value is NotImplemented:
            return value
        node = self.graph.create_node(op, target, *nodes, name="self_1" if target == "self" else None)
        if target is in_region:
            node.meta["called"] = called
        if region[2] is False and self.region[2] is True:
            self.without_gradients.add(node)
        with self.paused():
            self.written_to(node, value, versions)
        if called in _SIZED_BY_CONTENT or _by_mask(called, given):
            self.by_content.add(node)
        if called in _CUTS:  # into how many pieces, Python goes by
            if any(source in self.by_content for source in node.all_input_nodes):
                raise TraceError("the forward goes through a tensor whose size depends on the content of another")
            self.guard(self.graph.call_function(len, (node,)), len(value))
        if op == "call_module" or called in _DRAWS or any(n in self.activations for n in node.all_input_nodes):
            self.activations.add(node)
        if foreign:
            return self.foreign(value, node)
        if type(value) is bool:
            self.guard(node, value)
        elif op == "call_module" and not isinstance(value, Tensor):
            self.guard_parts(value, node, deep=True)
        return self.wrap(value, node)

    def written_to(self, node: fx.Node, value: Any, versions: list[tuple[Tensor, int]]) -> None:
        """An operand that an operation writes to and gives back is, from then on, what the operation gives."""
        for tensor, version in versions:
            if tensor is value and tensor._version != version and id(tensor) in self.known:
                self.register(tensor, node)
                storage = tensor.untyped_storage().data_ptr()
                for other, _ in list(self.known.values()):
                    if isinstance(other, Tensor) and other is not tensor and _shares(other, storage):
                        self.shared[id(other)] = node

    def call_function(self, function: Any, args: tuple, kwargs: dict) -> Any:
        return self.made("call_function", function, args, kwargs, function)

    def go_through(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """A function from a registry; the nodes of what it does are marked with its name."""
        last = next(reversed(self.graph.nodes))
        value = function(*args, **kwargs)
        while (last := last.next).op != "root":
            last.meta["registry"] = function.__name__
        return value

    def call_object(self, owner: Recorded | RecordedList, args: tuple, kwargs: dict) -> Any:
        return self.made("call_function", call_object, (owner, *args), kwargs, call_object, foreign=True)

    def effect(self, function: Any, args: tuple) -> None:
        """Something that is done to a tensor or an object."""
        if type(args[0]) in (Recorded, RecordedList):
            self.check_writable(args[0])
        self.made("call_function", function, args, {}, function)

    def check_writable(self, owner: Recorded | RecordedList) -> None:
        if owner._settled is not None:
            self.refuse_change(owner._settled)

    def call_module(self, child: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = self.path_of(child)
        if not path:
            raise TraceError("the forward calls the module itself")
        if isinstance(self.real(child), torch.jit.ScriptModule):
            raise TraceError(
                f"the forward calls {path}, a TorchScript module",
                why="what it remembers between calls can't be told, nor put back as it was",
            )
        self.check_draws()
        given = None
        if self.calls is not None:
            with self.paused():
                given = copied(self.real(args)), copied(self.real(kwargs))
        value = self.made("call_module", path, args, kwargs, self.real(child))
        if self.calls is not None and given is not None:
            node = next(node for node in reversed(self.graph.nodes) if node.op == "call_module")
            self.calls.append((node, self.real(child), *given))
        self.drawn = _outside()  # what a child draws is its own affair
        return value

    def check_draws(self) -> None:
        if _outside() != self.drawn:
            raise TraceError("the forward draws random numbers outside of torch, which no graph can repeat")

    def call_method(self, owner: Recorded | RecordedList, name: str, /, *args: Any, **kwargs: Any) -> Any:
        def run(real: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(real, name)(*args, **kwargs)

        if name in _CHANGES and isinstance(owner._real, (list, dict, set)):
            self.check_writable(owner)
        if owner._settled is not None:
            with self.paused():
                if run(owner._real, *self.real(args), **self.real(kwargs)) is owner._real:
                    return owner  # a config that is asked for the part of it that it is itself
        return self.made("call_method", name, (owner, *args), kwargs, run, foreign=True)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors among arguments, each with how often it was written to."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [(value, value._version)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [pair for item in items for pair in _versions(item)]


def _shares(tensor: Tensor, storage: int) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() == storage


def _outside() -> tuple:
    """The state of random numbers that torch does not draw."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), state and (state[1].tobytes(), *state[2:])


def _absent(parameter: inspect.Parameter) -> Any:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return ()
    return {} if parameter.kind is parameter.VAR_KEYWORD else parameter.default


def _by_mask(target: Any, args: tuple) -> bool:
    if target is not operator.getitem or len(args) < 2:
        return False
    keys = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)


# Methods of lists, dicts and sets.
_CHANGES = frozenset({"append", "extend", "insert", "pop", "popitem", "remove", "discard", "clear", "reverse", "sort",
                      "setdefault", "update", "add"})  # fmt: skip
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
_DRAWS = frozenset({torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randint_like,
                    torch.randperm, torch.bernoulli, torch.multinomial, torch.normal})  # fmt: skip
_SIZED_BY_CONTENT = frozenset({torch.nonzero, "nonzero", torch.masked_select, "masked_select", torch.unique, "unique",
                               torch.unique_consecutive, "unique_consecutive", torch.argwhere, "argwhere"})  # fmt: skip
_CUTS = frozenset({torch.unbind, "unbind", torch.split, "split"})
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
