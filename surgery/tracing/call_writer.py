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
from surgery.tracing.attribute_reads import Reader
from surgery.tracing.example_call import copied
from surgery.tracing.guards import context, in_region
from surgery.tracing.provenance import Ledger
from surgery.tracing.proxies import Recorded, RecordedList, call_object

__all__ = ["CallWriter", "Calls"]

# Calls of children: the node, the child, copies of the arguments.
Calls = list[tuple[fx.Node, nn.Module, tuple, dict[str, Any]]]


class CallWriter:
    """Makes one node of each call. `calls`: a list that gets the calls of children."""

    def __init__(self, ledger: Ledger, reader: Reader, calls: Calls | None = None):
        self.ledger, self.reader, self.calls = ledger, reader, calls
        self.region = context(True)
        self.drawn: tuple = ()

    def write(
        self, op: str, target: Any, args: tuple, kwargs: dict, run: Callable[..., Any], foreign: bool = False
    ) -> Any:
        """One node, run for its value. `foreign`: an object of the user's gives it."""
        # Before the real ones, since what is handed on is copied here.
        nodes = self.ledger.node(args), self.ledger.node(kwargs)
        given, named = self.ledger.real(args), self.ledger.real(kwargs)
        with self.ledger.paused():
            versions = _versions((given, named))
            value = run(*given, **named)
        region, called = context(True), target
        if region != self.region:
            if op == "call_module":
                raise TraceError("the forward calls a child under torch.no_grad or torch.autocast of its own")
            function = target if isinstance(target, str) else self.ledger.kept(target)
            op, target, nodes = "call_function", in_region, ((region, function, *nodes[0]), nodes[1])
        if value is NotImplemented:
            return value
        node = self.ledger.graph.create_node(op, target, *nodes, name="self_1" if target == "self" else None)
        if target is in_region:
            node.meta["called"] = called
        if region[2] is False and self.region[2] is True:
            self.ledger.without_gradients.add(node)
        with self.ledger.paused():
            self.written_to(node, value, versions)
        if called in _SIZED_BY_CONTENT or _by_mask(called, given):
            self.ledger.by_content.add(node)
        if called in _CUTS:  # into how many pieces, Python goes by
            if any(source in self.ledger.by_content for source in node.all_input_nodes):
                raise TraceError("the forward goes through a tensor whose size depends on the content of another")
            self.ledger.guard(self.ledger.graph.call_function(len, (node,)), len(value))
        if op == "call_module" or called in _DRAWS or any(n in self.ledger.activations for n in node.all_input_nodes):
            self.ledger.activations.add(node)
        if foreign:
            return self.reader.foreign(value, node)
        if type(value) is bool:
            self.ledger.guard(node, value)
        elif op == "call_module" and not isinstance(value, Tensor):
            self.ledger.guard_parts(value, node, deep=True)
        return self.reader.wrap(value, node)

    def written_to(self, node: fx.Node, value: Any, versions: list[tuple[Tensor, int]]) -> None:
        """An operand that an operation writes to and gives back is, from then on, what the operation gives."""
        for tensor, version in versions:
            if tensor is value and tensor._version != version and id(tensor) in self.ledger.known:
                self.ledger.register(tensor, node)
                storage = tensor.untyped_storage().data_ptr()
                for other, _ in list(self.ledger.known.values()):
                    if isinstance(other, Tensor) and other is not tensor and _shares(other, storage):
                        self.ledger.shared[id(other)] = node

    def call_function(self, function: Any, args: tuple, kwargs: dict) -> Any:
        return self.write("call_function", function, args, kwargs, function)

    def go_through(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """A function from a registry; the nodes of what it does are marked with its name."""
        last = next(reversed(self.ledger.graph.nodes))
        value = function(*args, **kwargs)
        while (last := last.next).op != "root":
            last.meta["registry"] = function.__name__
        return value

    def call_object(self, owner: Recorded | RecordedList, args: tuple, kwargs: dict) -> Any:
        return self.write("call_function", call_object, (owner, *args), kwargs, call_object, foreign=True)

    def effect(self, function: Any, args: tuple) -> None:
        """Something that is done to a tensor or an object."""
        if type(args[0]) in (Recorded, RecordedList):
            self.check_writable(args[0])
        self.write("call_function", function, args, {}, function)

    def check_writable(self, owner: Recorded | RecordedList) -> None:
        if owner._settled is not None:
            self.reader.refuse_change(owner._settled)

    def call_module(self, child: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = self.ledger.path_of(child)
        if not path:
            raise TraceError("the forward calls the module itself")
        if isinstance(self.ledger.real(child), torch.jit.ScriptModule):
            raise TraceError(
                f"the forward calls {path}, a TorchScript module",
                why="what it remembers between calls can't be told, nor put back as it was",
            )
        self.check_draws()
        given = None
        if self.calls is not None:
            with self.ledger.paused():
                given = copied(self.ledger.real(args)), copied(self.ledger.real(kwargs))
        value = self.write("call_module", path, args, kwargs, self.ledger.real(child))
        if self.calls is not None and given is not None:
            node = next(node for node in reversed(self.ledger.graph.nodes) if node.op == "call_module")
            self.calls.append((node, self.ledger.real(child), *given))
        self.note_draws()  # what a child draws is its own affair
        return value

    def note_draws(self) -> None:
        self.drawn = _random_state()

    def check_draws(self) -> None:
        if _random_state() != self.drawn:
            raise TraceError("the forward draws random numbers outside of torch, which no graph can repeat")

    def call_method(self, owner: Recorded | RecordedList, name: str, /, *args: Any, **kwargs: Any) -> Any:
        def run(real: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(real, name)(*args, **kwargs)

        if name in _CHANGES and isinstance(owner._real, (list, dict, set)):
            self.check_writable(owner)
        if owner._settled is not None:
            with self.ledger.paused():
                if run(owner._real, *self.ledger.real(args), **self.ledger.real(kwargs)) is owner._real:
                    return owner  # a config that is asked for the part of it that it is itself
        return self.write("call_method", name, (owner, *args), kwargs, run, foreign=True)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors among arguments, each with how often it was written to."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [(value, value._version)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [pair for item in items for pair in _versions(item)]


def _shares(tensor: Tensor, storage: int) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() == storage


def _random_state() -> tuple:
    """The state of random numbers that torch does not draw."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), state and (state[1].tobytes(), *state[2:])


def _by_mask(target: Any, args: tuple) -> bool:
    if target is not operator.getitem or len(args) < 2:
        return False
    keys = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)


# Methods of lists, dicts and sets.
_CHANGES = frozenset({"append", "extend", "insert", "pop", "popitem", "remove", "discard", "clear", "reverse", "sort",
                      "setdefault", "update", "add"})  # fmt: skip
_DRAWS = frozenset({torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randint_like,
                    torch.randperm, torch.bernoulli, torch.multinomial, torch.normal})  # fmt: skip
_SIZED_BY_CONTENT = frozenset({torch.nonzero, "nonzero", torch.masked_select, "masked_select", torch.unique, "unique",
                               torch.unique_consecutive, "unique_consecutive", torch.argwhere, "argwhere"})  # fmt: skip
_CUTS = frozenset({torch.unbind, "unbind", torch.split, "split"})
