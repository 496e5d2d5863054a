"""A site from inside: the operations of its forward, as values to compute with and to replace."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from surgery.authoring.site_facts import LEFT_OUT, THROUGH
from surgery.errors import SiteError
from surgery.forward.function_registries import takes_functions
from surgery.forward.function_watch import unwatched
from surgery.forward.own_forward import OwnForward
from surgery.forward.parameter_view import find_tensor
from surgery.forward.tape import Tape, Value, ref_of
from surgery.structures.fx_digraph import as_digraph
from surgery.structures.op_aliases import LayerTensor
from surgery.structures.passed_ops import Passage, find_dropped_ops
from surgery.structures.structure import Found, Occurrence, Structure
from surgery.tracing.example_call import evaluating
from surgery.tracing.fx_args import plain
from surgery.tracing.traced_forward import goes_through, trace_for_call

__all__ = ["ForwardValues"]


class ForwardValues:
    """The part of a `Site` that looks into its forward."""

    module: nn.Module
    path: str
    label: str
    own: OwnForward
    tape: Tape
    inside: bool
    missed: dict[Structure, str]  # what was looked for in vain, and why it is not there
    facts: dict[str, Any]
    _nodes: dict[str | int, fx.Node]
    _passages: list[Passage]
    _inner: dict[str, frozenset[str]]  # by the root of a match, the operations that are in it alone
    _replaced: dict[str, frozenset[str]]  # the roots that were replaced

    def needed_example(self, why: str) -> tuple[tuple, dict[str, Any]]:
        raise NotImplementedError

    def _value(self, kind: str, key: str) -> Tensor:
        raise NotImplementedError

    @property
    def graph(self) -> fx.Graph:
        """The module's own forward as a graph, for calls like the one at hand: to be read, not to be changed.

        Its shapes and dtypes (`node.meta`) are the example's. A rule that looks at it is asked again for each kind of
        call: in training and in evaluation, with a mask and without one. Needs `example_inputs`. Raises `TraceError`
        where the forward can't be held in a graph, `SiteError` without an example.
        """
        if self.own.graph is None:
            example = self.needed_example("which operations a forward consists of is found by running it once")
            with unwatched(self.tape), torch.no_grad(), evaluating(self.module):  # as the example was seen
                self.own = trace_for_call(self.module, self.own, *example, leaves=THROUGH not in self.facts)
        self.inside = True
        assert self.own.graph is not None
        self._nodes = {node.name: node for node in self.own.graph.nodes}
        return self.own.graph

    def find(self, structure: Structure, *, leaves: bool = True) -> Found:
        """Where a structure occurs inside the forward; nodes and bindings are values to compute with and to `replace`.

        A function that the forward takes from a registry, as transformers' attentions do, is one operation; with
        `leaves=False` it is gone through, and what it does can be found and replaced.

        >>> import torch
        >>> from torch import nn
        >>> from surgery import Rule, Structure, apply_rules, rule
        >>> GELU = Structure(lambda x: torch.nn.functional.gelu(x))
        >>> @rule("doc-swish")
        ... class SwishRule(Rule):
        ...     def rewrite(self, site):
        ...         for gelu in site.find(GELU):
        ...             x = gelu.bindings["x"]
        ...             site.replace(gelu.root, x * torch.sigmoid(x))
        >>> class Mlp(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x, scale=1.0):
        ...         return self.down(torch.nn.functional.gelu(self.up(x))) * scale
        >>> mlp, x = Mlp(), torch.randn(2, 4)
        >>> _ = apply_rules(mlp, SwishRule(Mlp), example_inputs=x)
        >>> torch.equal(mlp(x), mlp.down(torch.nn.functional.silu(mlp.up(x)))), torch.allclose(mlp(x, 2.0), 2 * mlp(x))
        (False, True)

        Empty where there is none, with the `reason`. What a match passes over (`passed`) and a new value leaves out,
        such as a dropout, is a `SurgeryWarning`, unless the rule has asked for `passed`: it may put them into the new
        value by `again`. Raises what `graph` raises; `SiteError` for `leaves=False` after the forward was looked at
        without, or beside a function that a rule puts around those from registries.
        """
        if not leaves:
            self._go_through()
        graph = self.graph
        found = structure.find(as_digraph(graph, self.module))
        if leaves and goes_through(graph):
            found = Found(
                [one for one in found if not any("registry" in node.meta for node in one.nodes)], found.reason
            )
        if not found:
            self.missed[structure] = found.reason
        return Found([self._match(occurrence) for occurrence in found], found.reason)

    def _match(self, found: Occurrence) -> Occurrence:
        inner = {str(node.name) for node in found.nodes if node is not found.root and node not in found.shared}
        self._inner[found.root.name] = self._inner.get(found.root.name, frozenset()) | inner
        passage = Passage(found.root, found.passed)
        self._passages.append(passage)

        def asked() -> None:
            passage.asked = True

        return found.mapped(functools.partial(self._shown, root=found.root), asked)

    def _go_through(self) -> None:
        """From now on, the graph is one that goes through functions from registries."""
        if THROUGH in self.facts or not takes_functions(self.module):
            return
        if self.own.graph is not None:
            raise SiteError(
                f"{self.label} looks into functions from registries after it has looked at the forward without them",
                where=self.path,
                why="the values that it has are of another graph",
                fix="pass leaves=False to the first site.find of the rewrite",
            )
        self.facts[THROUGH] = True

    def left_out(self) -> list[str]:
        """What the rewrite leaves out of its matches without having asked; each kind of operation is told once."""
        told: list[str] = []
        if self._passages and self.own.graph is not None:
            for kind, text in find_dropped_ops(self._passages, self.own.graph, self.module, self.tape):
                if kind not in self.facts.setdefault(LEFT_OUT, []):
                    self.facts[LEFT_OUT].append(kind)
                    told.append(f"{self.label} at {self.path or 'the model itself'}: {text}; read the match's passed")
        return told

    def _check_overlap(self, name: str, new: Any) -> None:
        """Refuse to replace two matches of which one has the other's result inside, and computes nothing from it."""
        inner = self._inner.get(name, frozenset()) - self.tape.named_in(new)
        both = [other for other, its in self._replaced.items() if other in inner or name in its]
        if both:
            raise SiteError(
                f"{self.label} replaces matches that overlap: {both[0]} and {name}",
                where=self.path,
                why="the result of one is an operation inside of the other, and what is put in its place would be lost",
                fix="skip matches that have nodes in common",
            )
        self._replaced[name] = inner

    def at(self, node: fx.Node) -> Tensor:
        """The value of a node of `graph`: what it is at present, edits of earlier rules included."""
        return self._at(node)

    def _at(self, node: fx.Node, read: str = "") -> Tensor:
        if node.op == "placeholder":
            return cast(Tensor, self.tape.value("input", str(node.target).lstrip("*"), read))
        if node.op == "get_attr" and find_tensor(self.module, str(node.target)) is not None:
            return self._value("state", str(node.target))
        return cast(Tensor, self.tape.value("inside", node.name, read))

    def node_of(self, value: Tensor) -> fx.Node:
        """The node of a value that `find` or `at` gave."""
        ref = ref_of(cast(Value, value))
        found = self._nodes.get(ref.key) if ref.kind in ("inside", "made") else None
        if found is None:
            named = {"input": "placeholder", "state": "get_attr"}.get(ref.kind)
            alike = (n for n in self._nodes.values() if n.op == named and str(n.target).lstrip("*") == ref.key)
            found = next(alike, None)
        if found is None:
            raise SiteError(f"{value!r} is no value inside the forward", where=self.path)
        return found

    def base(self, value: Tensor) -> Tensor:
        """What an operation inside the forward itself gives, before what any rule put in its place."""
        return self._value("made", self.node_of(value).name)

    def again(self, value: Tensor, swaps: Mapping[Any, Any]) -> Tensor:
        """The operation that makes `value` once more, with other operands: pairs of an operand's value or node, and
        what stands in its place."""
        node = self.node_of(value)
        others = {old if isinstance(old, fx.Node) else self.node_of(old): new for old, new in swaps.items()}
        given = [plain(part, lambda n: others.get(n, self.at(n))) for part in (node.args, node.kwargs)]
        kinds = {"call_function": "function", "call_method": "method", "call_module": "module"}
        if node.op not in kinds:
            raise SiteError(f"{value!r} is made by no operation", where=self.path)
        return cast(Tensor, self.tape.call(kinds[node.op], node.target, *given))

    def _shown(self, value: Any, root: fx.Node) -> Any:
        """A match's nodes as values: its operands are read where the match ends."""
        if isinstance(value, LayerTensor):  # a parameter of a layer that is one operation
            return self._value("state", str(value))
        return plain(value, lambda node: self._at(node, "" if node is root else root.name))
