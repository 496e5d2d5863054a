"""Chooses which nodes of a graph get lines of their own. The text of any other node stands where the node is used."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from surgery.forward.unpacking import unpack
from surgery.inspection.line_order import NONE, WRITES, effect_of, in_order
from surgery.inspection.readable_graph import operands, region_of
from surgery.inspection.variable_names import VariableName

__all__ = ["IN_PLACE", "StatementChoice", "first_operand"]

IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.imatmul: operator.matmul, operator.iand: operator.and_,
    operator.ior: operator.or_, operator.ixor: operator.xor, operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}  # fmt: skip
_CONSTANT = (
    "dtype",
    "device",
    "ndim",
)  # attributes that no write in place changes; "shape" only changes by a method of _RESHAPING
_RESHAPING = frozenset({"resize_", "resize_as_", "set_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_",
                        "unsqueeze_", "as_strided_"})  # fmt: skip


class StatementChoice:
    """The nodes of a graph that get lines, in the order of the lines; and the nodes that are written inside others.

    `names`: the variable names of the rules' own code. `split`: nodes that get lines because longer lines would be
    too wide.
    """

    def __init__(self, graph: fx.Graph, names: Mapping[tuple[int, int], VariableName], split: set[fx.Node]):
        self.nodes, self.names, self.split = list(graph.nodes), names, split
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.result = graph.output_node()
        self.reshaping = any(str(node.target) in _RESHAPING for node in self.nodes)
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in operands(node):
                self.users[operand].append(node)
        self.repeated = {node for node in self.nodes if self._is_repeated(node)}
        for node in reversed(self.nodes):  # reading an attribute of a value counts as a use of the value
            if node in self.repeated and node.op != "get_attr":
                owner = node.args[0]
                self.users[owner] = [user for user in self.users[owner] if user is not node] + self.users[node]  # type: ignore[index]
        self.inlined: set[fx.Node] = set()  # nodes whose text stands inside their only user
        self.effects: dict[fx.Node, int] = {}  # the effect of a node together with its inlined operands
        for node in self.nodes:
            inner = [operand for operand in operands(node) if self._fits_in(operand, node)]
            self.inlined.update(inner)
            self.effects[node] = max([effect_of(node), *(self.effects[operand] for operand in inner)])

    def _is_repeated(self, node: fx.Node) -> bool:
        """Whether each use repeats the text of the node: a tensor of the module, or the dtype of a value."""
        if node.op == "get_attr":
            return True
        if node.target is getattr:
            return len(self.users[node]) > 1 and node.args[1] in (
                _CONSTANT if self.reshaping else (*_CONSTANT, "shape")
            )
        shape = node.args[0] if node.target is operator.getitem else None
        return (
            isinstance(shape, fx.Node) and shape.target is getattr and shape.args[1] == "shape" and not self.reshaping
        )

    def _fits_in(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a node can stand inside its user: the results stay equal, and the line stays readable."""
        if node in self.repeated or node.op == "placeholder" or node in self.split or len(self.users[node]) != 1:
            return False
        if "writes" in node.meta or self.is_unpacked_item(node):
            return False
        if user is not self.result:
            if region_of(node) != region_of(user) or node.meta.get("surgery") != user.meta.get("surgery"):
                return False
            if node.meta.get("output") or user.target in (unpack, *IN_PLACE) and first_operand(user) is node:
                return False
            name = self.variable_name(node)
            if name is not None and name.assigned:
                return False
        elif region_of(node) is not None or not self._alone_at_end(node):
            return False
        between = [other for other in self.nodes[self.place[node] + 1 : self.place[user]] if other not in self.repeated]
        if self.effects[node] == WRITES:
            return not between
        return not any(
            effect_of(other) > NONE if self.effects[node] else effect_of(other) == WRITES for other in between
        )

    def _alone_at_end(self, node: fx.Node) -> bool:
        """Whether the forward returns this value alone, and the rule's code does not name it."""
        name = self.variable_name(node)
        return self.result.args[0] is node and (name is None or not name.assigned)

    def is_unpacked_item(self, node: fx.Node) -> bool:
        """Whether the line that unpacks a tuple assigns the node."""
        source = node.args[0] if node.target is operator.getitem else None
        return isinstance(source, fx.Node) and source.target is unpack

    def variable_name(self, node: fx.Node) -> VariableName | None:
        """The name of a node's value in the rule's own code."""
        return self.names.get(node.meta.get("step") or (0, -1))

    def statements(self) -> list[fx.Node]:
        """The nodes with lines, in the order of the lines."""
        statements = [
            node
            for node in self.nodes
            if node.op not in ("placeholder", "output")
            and node not in self.inlined
            and node not in self.repeated
            and not self.is_unpacked_item(node)
        ]
        sources = {node: list(self._sources(node)) for node in statements}
        return in_order(statements, sources, self.effects)

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The statements whose values a statement uses, also through inlined nodes."""
        waiting = [node]
        while waiting:
            for operand in operands(waiting.pop()):
                if operand in self.inlined or operand in self.repeated:
                    waiting.append(operand)
                elif self.is_unpacked_item(operand):
                    yield operand.args[0]  # type: ignore[misc]
                elif operand.op != "placeholder":
                    yield operand

    def written_inside(self, node: fx.Node) -> set[Any]:
        """The nodes whose text stands inside the line of a node."""
        nodes, waiting = set[Any](), [node]
        while waiting:
            inner = [operand for operand in operands(waiting.pop()) if operand in self.inlined]
            nodes.update(inner)
            waiting += inner
        return nodes


def first_operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else None
