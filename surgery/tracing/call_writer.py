"""Writes the calls of a forward as nodes of the graph, and runs each for its value."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import TraceError
from surgery.forward.function_registries import with_leaves
from surgery.tracing.attribute_reads import Reader
from surgery.tracing.depth import LAYERS, Depth
from surgery.tracing.guards import context, in_region
from surgery.tracing.inlining import HOOKS, inlining_objection
from surgery.tracing.provenance import Ledger
from surgery.tracing.proxies import RecordedList, RecordedObject, call_object
from surgery.transaction.object_contents import copied

__all__ = ["CallWriter", "Calls"]

# Calls of children: the node, the child, copies of the arguments.
Calls = list[tuple[fx.Node, nn.Module, tuple, dict[str, Any]]]


class CallWriter:
    """Writes each call as one node, except those that `depth` looks into. `calls`: gets the calls of children."""

    def __init__(self, ledger: Ledger, reader: Reader, calls: Calls | None = None, depth: Depth = LAYERS):
        self.ledger, self.reader, self.calls, self.depth = ledger, reader, calls, depth
        self.region = context(True)
        self.random: tuple = ()  # the random state outside torch after the last call of a child

    def write(
        self, op: str, target: Any, args: tuple, kwargs: dict, run: Callable[..., Any], external: bool = False
    ) -> Any:
        """Write one node, and run the call for its value. `external`: the result comes from an object of the user."""
        # `node` comes before `real`, because it copies objects that the forward passes on.
        with self.ledger.paused():  # the tracer's own reads of a tensor are not decisions of the forward
            nodes = self.ledger.node(args), self.ledger.node(kwargs)
        real_args, real_kwargs = self.ledger.real(args), self.ledger.real(kwargs)
        with self.ledger.paused():
            versions = _versions((real_args, real_kwargs))
            value = run(*real_args, **real_kwargs)
        region, called_target = context(True), target
        if region != self.region:
            if op == "call_module":
                raise TraceError("the forward calls a child under torch.no_grad or torch.autocast of its own")
            function = target if isinstance(target, str) else self.ledger.keep(target)
            op, target, nodes = "call_function", in_region, ((region, function, *nodes[0]), nodes[1])
        if value is NotImplemented:
            return value
        node = self.ledger.graph.create_node(op, target, *nodes)
        if target is in_region:
            node.meta["called"] = called_target
        if region[2] is False and self.region[2] is True:
            self.ledger.without_gradients.add(node)
        with self.ledger.paused():
            self.note_write(node, value, versions)
        if called_target in _SIZED_BY_CONTENT or _selects_by_mask(called_target, real_args):
            self.ledger.by_content.add(node)
        if called_target in _CUTS:  # Python may depend on the number of pieces
            if any(source in self.ledger.by_content for source in node.all_input_nodes):
                raise TraceError("the forward goes through a tensor whose size depends on the content of another")
            self.ledger.guard(self.ledger.graph.call_function(len, (node,)), len(value))
        from_activations = any(source in self.ledger.activations for source in node.all_input_nodes)
        if op == "call_module" or called_target in _DRAWS or from_activations:
            self.ledger.activations.add(node)
        if external:
            return self.reader.wrap_external(value, node)
        if type(value) is bool:
            self.ledger.guard(node, value)
        elif op == "call_module" and not isinstance(value, Tensor):
            self.ledger.guard_parts(value, node, deep=True)
        return self.reader.wrap(value, node)

    def note_write(self, node: fx.Node, value: Any, versions: list[tuple[Tensor, int]]) -> None:
        """Register an operand as the result of the operation that writes to it in place and returns it."""
        for tensor, version in versions:
            if tensor is value and tensor._version != version and id(tensor) in self.ledger.entries:
                self.ledger.register(tensor, node)
                storage = tensor.untyped_storage().data_ptr()
                for entry, _ in list(self.ledger.entries.values()):
                    if isinstance(entry, Tensor) and entry is not tensor and _shares_storage(entry, storage):
                        self.ledger.shared[id(entry)] = node

    def call_function(self, function: Any, args: tuple, kwargs: dict) -> Any:
        return self.write("call_function", function, args, kwargs, function)

    def go_through(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function from a registry, and mark the nodes of its operations with its name."""
        last = next(reversed(self.ledger.graph.nodes))
        value = function(*args, **kwargs)
        while (last := last.next).op != "root":
            last.meta["registry"] = function.__name__
        return value

    def forward_of(self, base: type[nn.Module]) -> Any:
        """Returns the forward of a class, with functions from registries as the depth of the trace says."""
        return with_leaves(base.forward, self.call_function if self.depth.leaves else self.go_through)

    def inline(self, child: nn.Module, path: str, args: tuple, kwargs: dict) -> Any:
        """Run the forward of a child on its view, so that its operations become nodes, marked with the child's path."""
        real = self.ledger.real(child)
        if objection := inlining_objection(real):
            raise TraceError(f"the operations of {path} can't be a part of another forward", why=objection)
        for name in HOOKS:  # a hook that is registered later would not run
            self.reader.settings.setdefault((*path.split("."), name), {})
        last = next(reversed(self.ledger.graph.nodes))
        value = self.forward_of(type(real))(child, *args, **kwargs)
        while (last := last.next).op != "root":
            last.meta.setdefault("inlined", path)
        return value

    def call_object(self, owner: RecordedObject | RecordedList, args: tuple, kwargs: dict) -> Any:
        return self.write("call_function", call_object, (owner, *args), kwargs, call_object, external=True)

    def write_to(self, function: Any, args: tuple) -> None:
        """Record a function that writes to a tensor or an object, such as `setitem`."""
        if type(args[0]) in (RecordedObject, RecordedList):
            self.check_writable(args[0])
        self.write("call_function", function, args, {}, function)

    def check_writable(self, owner: RecordedObject | RecordedList) -> None:
        if owner._settled is not None:
            self.reader.refuse_change(owner._settled)

    def call_module(self, child: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = self.ledger.path_of(child)
        if not path:
            raise TraceError("the forward calls the module itself")
        if isinstance(self.ledger.real(child), torch.jit.ScriptModule):
            raise TraceError(
                f"the forward calls {path}, a TorchScript module",
                why="its state between calls is invisible and can't be restored",
            )
        if path in self.depth.inlined:
            return self.inline(child, path, args, kwargs)
        self.check_draws()
        argument_copies = None
        if self.calls is not None:
            with self.ledger.paused():
                argument_copies = copied(self.ledger.real(args)), copied(self.ledger.real(kwargs))
        value = self.write("call_module", path, args, kwargs, self.ledger.real(child))
        if self.calls is not None and argument_copies is not None:
            node = next(node for node in reversed(self.ledger.graph.nodes) if node.op == "call_module")
            self.calls.append((node, self.ledger.real(child), *argument_copies))
        self.note_draws()  # the graph calls the child, so the child may draw numbers
        return value

    def note_draws(self) -> None:
        """Accept the random numbers that were drawn outside torch until now."""
        self.random = _random_state()

    def check_draws(self) -> None:
        """Raise `TraceError` if the forward itself drew random numbers outside torch."""
        if _random_state() != self.random:
            raise TraceError("the forward draws random numbers outside of torch, which no graph can repeat")

    def call_method(self, owner: RecordedObject | RecordedList, name: str, /, *args: Any, **kwargs: Any) -> Any:
        def run(real: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(real, name)(*args, **kwargs)

        if name in _WRITES and isinstance(owner._real, (list, dict, set)):
            self.check_writable(owner)
        if owner._settled is not None:
            with self.ledger.paused():
                if run(owner._real, *self.ledger.real(args), **self.ledger.real(kwargs)) is owner._real:
                    return owner  # such as `config.get_text_config()` of a text model
        return self.write("call_method", name, (owner, *args), kwargs, run, external=True)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """Returns the tensors in arguments, each with its version counter."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [(value, value._version)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [pair for item in items for pair in _versions(item)]


def _shares_storage(tensor: Tensor, storage: int) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() == storage


def _random_state() -> tuple:
    """Returns the state of the random generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), state and (state[1].tobytes(), *state[2:])


def _selects_by_mask(target: Any, args: tuple) -> bool:
    if target is not operator.getitem or len(args) < 2:
        return False
    keys = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)


# Methods of lists, dicts and sets.
_WRITES = frozenset({"append", "extend", "insert", "pop", "popitem", "remove", "discard", "clear", "reverse", "sort",
                     "setdefault", "update", "add"})  # fmt: skip
_DRAWS = frozenset({torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randint_like,
                    torch.randperm, torch.bernoulli, torch.multinomial, torch.normal})  # fmt: skip
_SIZED_BY_CONTENT = frozenset({torch.nonzero, "nonzero", torch.masked_select, "masked_select", torch.unique, "unique",
                               torch.unique_consecutive, "unique_consecutive", torch.argwhere, "argwhere"})  # fmt: skip
_CUTS = frozenset({torch.unbind, "unbind", torch.split, "split"})
