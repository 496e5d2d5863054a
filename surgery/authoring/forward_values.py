"""`ForwardValues`: the operations inside a site's forward, as values to compute with and to replace."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from surgery.authoring.matched_module import MatchedModule
from surgery.authoring.site_facts import INLINED, LEFT_OUT, THROUGH, depth_of
from surgery.errors import SiteError
from surgery.forward.function_registries import takes_functions
from surgery.forward.function_watch import pause_watch
from surgery.forward.own_forward import OwnForward
from surgery.forward.parameter_view import find_tensor
from surgery.forward.tape import Tape
from surgery.forward.values import Value, ref_of
from surgery.structures.fx_digraph import as_digraph
from surgery.structures.op_aliases import LayerTensor, ModulePath
from surgery.structures.skipped_ops import Passage, find_dropped_ops
from surgery.structures.structure import Found, Occurrence, Structure
from surgery.tracing.example_call import evaluating
from surgery.tracing.fx_args import replace_nodes
from surgery.tracing.traced_forward import goes_through, trace_for_call

__all__ = ["ForwardValues"]


class ForwardValues:
    """The base class of `Site` for rules that look into the forward."""

    module: nn.Module
    path: str
    label: str
    own: OwnForward
    tape: Tape
    inside: bool
    missed: dict[Structure, str]  # structures without a match → the reason
    facts: dict[str, Any]
    _nodes: dict[str | int, fx.Node]
    _passages: list[Passage]
    _inner: dict[str, frozenset[str]]  # root of a match → operations that only this match contains
    _replaced: dict[str, frozenset[str]]  # the same, for roots that were replaced

    def needed_example(self, why: str) -> tuple[tuple, dict[str, Any]]:
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        raise NotImplementedError

    def _value(self, kind: str, key: str) -> Tensor:
        raise NotImplementedError

    @property
    def graph(self) -> fx.Graph:
        """The module's own forward as a graph, for the present kind of call. Read it; do not change it.

        Its shapes and dtypes (`node.meta`) are those of the example. The rewrite of a rule that reads the graph runs
        again for each kind of call: training or evaluation, with or without a mask.

        Raises:
            TraceError: The forward can't be traced.
            SiteError: The rules were applied without `example_inputs`.
        """
        if self.own.graph is None:
            example = self.needed_example("one run of the forward shows its operations")
            with pause_watch(self.tape), torch.no_grad(), evaluating(self.module):  # as the example call was recorded
                self.own = trace_for_call(self.module, self.own, *example, depth=depth_of([self.facts]))
        self.inside = True
        assert self.own.graph is not None
        self._nodes = {node.name: node for node in self.own.graph.nodes}
        return self.own.graph

    def find(self, structure: Structure, *, leaves: bool = True) -> Found:
        """Find a structure inside the forward. Nodes and bindings of a match are values that a rule may `replace`.

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
        >>> silu = mlp.down(torch.nn.functional.silu(mlp.up(x)))
        >>> torch.allclose(mlp(x), silu, atol=1e-6), torch.allclose(mlp(x, 2.0), 2 * mlp(x))
        (True, True)

        Args:
            structure: The structure to search.
            leaves: Whether a function from a registry, such as transformers' attention, is one operation. With False,
                the search looks into such functions. Default True.

        Returns:
            The matches. Without a match it is empty, and its `reason` says why.

        Raises:
            TraceError: The forward can't be traced.
            SiteError: The rules were applied without `example_inputs`; or `leaves=False` comes after a search
                without it, or together with a function that a rule puts around those from registries.

        Warns:
            SurgeryWarning: The new value drops an operation that the match passes over, such as a dropout. Read
                `passed` to avoid the warning; `again` runs such an operation on the new value.
        """
        if not leaves:
            self._go_through()
        graph = self.graph
        matches = structure.find(as_digraph(graph, self.module))
        if leaves and goes_through(graph):
            outside = [match for match in matches if not any("registry" in node.meta for node in match.nodes)]
            matches = Found(outside, matches.reason)
        if INLINED not in self.facts:
            own = [match for match in matches if not any("inlined" in node.meta for node in match.nodes)]
            matches = Found(own, matches.reason)
        if not matches:
            self.missed[structure] = matches.reason
        return Found([self._to_values(match) for match in matches], matches.reason)

    def _to_values(self, match: Occurrence) -> Occurrence:
        """Convert the nodes of a match to values, and note what the match contains."""
        inner = {str(node.name) for node in match.nodes if node not in match.roots and node not in match.shared}
        for root in match.roots:
            self._inner[root.name] = self._inner.get(root.name, frozenset()) | inner
        passage = Passage(match.root, match.passed)
        self._passages.append(passage)

        def note_read() -> None:
            passage.was_read = True

        return match.mapped(functools.partial(self._to_value, root=self._end_of(match)), note_read)

    def _end_of(self, match: Occurrence) -> fx.Node:
        """Returns the node before which operands are read: the first result that comes after all operands."""
        if len(match.roots) == 1:
            return match.root
        order = {name: index for index, name in enumerate(self._nodes)}
        operands = [order[value.name] for value in match.bindings.values() if isinstance(value, fx.Node)]
        roots = sorted(match.roots, key=lambda root: order[root.name])
        return next((root for root in roots if order[root.name] > max(operands, default=-1)), roots[-1])

    def _go_through(self) -> None:
        """Make the graph one that looks into functions from registries."""
        if THROUGH in self.facts or not takes_functions(self.module):
            return
        if self.own.graph is not None:
            raise SiteError(
                f"{self.label} calls site.find(…, leaves=False) after it has read the graph without leaves=False",
                where=self.path,
                why="the values that the rule has belong to another graph",
                fix="pass leaves=False to the first site.find of the rewrite",
            )
        self.facts[THROUGH] = True

    def describe_dropped_ops(self) -> list[str]:
        """Returns warnings for operations that the rewrite drops unread, one for each kind of operation."""
        texts: list[str] = []
        if self._passages and self.own.graph is not None:
            for kind, text in find_dropped_ops(self._passages, self.own.graph, self.module, self.tape):
                if kind not in self.facts.setdefault(LEFT_OUT, []):
                    self.facts[LEFT_OUT].append(kind)
                    texts.append(f"{self.label} at {self.path or 'the model itself'}: {text}; read the match's passed")
        return texts

    def _check_overlap(self, name: str, new: Any) -> None:
        """Raise `SiteError` if two replaced matches overlap, so that the result of one would be lost."""
        inner = self._inner.get(name, frozenset()) - self.tape.source_nodes(new)
        both = [other for other, contained in self._replaced.items() if other in inner or name in contained]
        if both:
            raise SiteError(
                f"{self.label} replaces matches that overlap: {both[0]} and {name}",
                where=self.path,
                why="the result of one match is an operation inside the other, so its new value would be lost",
                fix="skip matches that share nodes",
            )
        self._replaced[name] = inner

    def at(self, node: fx.Node) -> Tensor:
        """Returns the value of a node of `graph`, with the edits of earlier rules."""
        return self._at(node)

    def _at(self, node: fx.Node, read: str = "") -> Tensor:
        if node.op == "placeholder":
            return cast(Tensor, self.tape.value("input", str(node.target).lstrip("*"), read))
        if node.op == "get_attr" and find_tensor(self.module, str(node.target)) is not None:
            return self._value("state", str(node.target))
        return cast(Tensor, self.tape.value("inside", node.name, read))

    def node_of(self, value: Tensor) -> fx.Node:
        """Returns the node of a value from `find` or `at`. Raises `SiteError` for other values."""
        ref = ref_of(cast(Value, value))
        node = self._nodes.get(ref.key) if ref.kind in ("inside", "made") else None
        if node is None:
            op = {"input": "placeholder", "state": "get_attr"}.get(ref.kind)
            candidates = (n for n in self._nodes.values() if n.op == op and str(n.target).lstrip("*") == ref.key)
            node = next(candidates, None)
        if node is None:
            raise SiteError(f"{value!r} is not a value inside the forward", where=self.path)
        return node

    def base(self, value: Tensor) -> Tensor:
        """Returns the original result of an operation inside the forward, without the edits of any rule."""
        return self._value("made", self.node_of(value).name)

    def again(self, value: Tensor, swaps: Mapping[Any, Any]) -> Tensor:
        """Run the operation that computes `value` once more, with other operands.

        Args:
            value: A value from `find` or `at`.
            swaps: Old operand (a value or a node) → new operand.

        Raises:
            SiteError: `value` is not the result of an operation.
        """
        node = self.node_of(value)
        swapped = {old if isinstance(old, fx.Node) else self.node_of(old): new for old, new in swaps.items()}
        arguments = [replace_nodes(part, lambda n: swapped.get(n, self.at(n))) for part in (node.args, node.kwargs)]
        kinds = {"call_function": "function", "call_method": "method", "call_module": "module"}
        if node.op not in kinds:
            raise SiteError(f"{value!r} is not the result of an operation", where=self.path)
        return cast(Tensor, self.tape.call(kinds[node.op], node.target, *arguments))

    def _to_value(self, value: Any, root: fx.Node) -> Any:
        """Convert a node of a match to a value. Operands are read where the match ends."""
        if isinstance(value, LayerTensor):  # a parameter of a layer that is one operation
            return self._value("state", str(value))
        if isinstance(value, ModulePath):
            return MatchedModule(self, str(value))
        return replace_nodes(value, lambda node: self._at(node, "" if node is root else root.name))
