"""A graph as lines of code: which values have a line of their own, their names, and the rule of each line."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from surgery.forward.graph_functions import detached, in_dtype, same_dtype, weighted
from surgery.forward.parameter_view import base_forward
from surgery.forward.unpacking import unpack
from surgery.inspection.expressions import Expressions
from surgery.inspection.function_names import INFIX, identifier
from surgery.inspection.line_order import NONE, WRITES, effect_of, in_order
from surgery.inspection.readable_graph import blocks_of, in_place_method, operands, region_of
from surgery.inspection.variable_names import VariableName
from surgery.tracing.decisions import check_decision, decide

__all__ = ["ANY", "WIDTH", "Line", "lines_of"]

WIDTH = 100  # of a line without its indentation; longer ones are split where a value can have a line of its own
GOOD = 80  # of a value that gets such a line
_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.imatmul: operator.matmul, operator.iand: operator.and_,
    operator.ior: operator.or_, operator.ixor: operator.xor, operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}  # fmt: skip
_CONSTANT = ("dtype", "device", "ndim")  # attributes that stay what they are, whatever is written to a tensor
_RESHAPING = frozenset({"resize_", "resize_as_", "set_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_",
                        "unsqueeze_", "as_strided_"})  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A statement, the rule that it is of ("": the forward's own), and the blocks it is in, as `with` opens them."""

    text: str
    origin: str
    blocks: str = ""


def lines_of(
    graph: fx.Graph,
    expressions: Expressions,
    parameters: Mapping[str, str],
    names: Mapping[tuple[int, int], VariableName],
) -> list[Line]:
    """The lines of a graph, whose adapters' parameters have lines before these. `parameters`: their names, by path."""
    split: set[fx.Node] = set()
    while True:
        body = _Body(graph, expressions, parameters, names, split)
        lines = list(body.lines())
        if not (more := body.to_split(lines) - split):
            return [line for _, line in lines]
        split |= more


class _Body:
    def __init__(
        self,
        graph: fx.Graph,
        expressions: Expressions,
        parameters: Mapping[str, str],
        names: Mapping[tuple[int, int], VariableName],
        split: set[fx.Node],
    ):
        self.nodes, self.expressions, self.parameters = list(graph.nodes), expressions, parameters
        self.names, self.split = names, split
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.result = graph.output_node()
        self.reshaping = any(str(node.target) in _RESHAPING for node in self.nodes)
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in operands(node):
                self.users[operand].append(node)
        self.plain = {node for node in self.nodes if self._is_plain(node)}
        for node in reversed(self.nodes):  # who reads the dtype of a value uses the value
            if node in self.plain and node.op != "get_attr":
                owner = node.args[0]
                self.users[owner] = [user for user in self.users[owner] if user is not node] + self.users[node]  # type: ignore[index]
        self.within: set[fx.Node] = set()  # nodes that are written inside of their only user
        self.effects: dict[fx.Node, int] = {}  # of a node with what is written inside of it
        for node in self.nodes:
            inner = [operand for operand in operands(node) if self._fits_in(operand, node)]
            self.within.update(inner)
            self.effects[node] = max([effect_of(node), *(self.effects[operand] for operand in inner)])

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether it is read wherever it is used: a tensor of the module, the dtype of a value."""
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
        """Whether a value can be written where it is used without a change of what is computed, and is plain there."""
        if node in self.plain or node.op == "placeholder" or node in self.split or len(self.users[node]) != 1:
            return False
        if "writes" in node.meta or self._unpacked_item(node):
            return False
        if user is not self.result:
            if region_of(node) != region_of(user) or node.meta.get("surgery") != user.meta.get("surgery"):
                return False
            if node.meta.get("output") or user.target in (unpack, *_IN_PLACE) and _first_operand(user) is node:
                return False
            name = self._name(node)
            if name is not None and name.assigned:
                return False
        elif region_of(node) is not None or not self._alone_at_end(node):
            return False
        between = [other for other in self.nodes[self.place[node] + 1 : self.place[user]] if other not in self.plain]
        if self.effects[node] == WRITES:
            return not between
        return not any(
            effect_of(other) > NONE if self.effects[node] else effect_of(other) == WRITES for other in between
        )

    def _alone_at_end(self, node: fx.Node) -> bool:
        """Whether the forward returns this very value, and nothing in it is called otherwise."""
        name = self._name(node)
        return self.result.args[0] is node and (name is None or not name.assigned)

    def _unpacked_item(self, node: fx.Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        return isinstance(source, fx.Node) and source.target is unpack

    def _name(self, node: fx.Node) -> VariableName | None:
        return self.names.get(node.meta.get("step") or (0, -1))

    # Lines ----------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[tuple[fx.Node, Line]]:
        statements = [
            node
            for node in self.nodes
            if node.op not in ("placeholder", "output")
            and node not in self.within
            and node not in self.plain
            and not self._unpacked_item(node)
        ]
        sources = {node: list(self._sources(node)) for node in statements}
        statements = in_order(statements, sources, self.effects)
        self._last_uses([*statements, self.result])
        self._name_functions()
        self.holders: dict[str, fx.Node | None] = dict.fromkeys(self.expressions.names.used)
        for node in self.nodes:
            if node.op == "placeholder":
                self._bind(node, str(node.target).lstrip("*"))
            elif node.op == "get_attr" and str(node.target) in self.parameters:
                self._bind(node, self.parameters[str(node.target)])
        for name in self.parameters.values():
            self.holders.setdefault(name, None)
        for index, node in enumerate(statements):
            yield node, Line(self._statement(node, index), node.meta.get("surgery", ""), blocks_of(region_of(node)))
        value = self.expressions.of(self.result.args[0])
        origin = next((n.meta.get("surgery", "") for n in operands(self.result) if n in self.within), None)
        yield self.result, Line(f"return {value}", ANY if origin is None else origin)

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The lines whose values a line uses."""
        waiting = [node]
        while waiting:
            for operand in operands(waiting.pop()):
                if operand in self.within or operand in self.plain:
                    waiting.append(operand)
                elif self._unpacked_item(operand):
                    yield operand.args[0]  # type: ignore[misc]
                elif operand.op != "placeholder":
                    yield operand

    def _name_functions(self) -> None:
        """Write each node once: after that it is known which names functions have."""
        variables = self.expressions.variables
        variables.update(dict.fromkeys(self.nodes, "_"))
        for node in self.nodes:
            if node.op != "output":
                self.expressions.written(node)
        variables.clear()

    def _last_uses(self, statements: Sequence[fx.Node]) -> None:
        """By value, the last line that names it."""
        self.last: dict[fx.Node, int] = {}
        for index, statement in enumerate(statements):
            waiting = [statement]
            while waiting:
                for operand in operands(waiting.pop()):
                    self.last[operand] = index
                    if operand in self.within or operand in self.plain:
                        waiting.append(operand)

    def _bind(self, node: fx.Node, name: str) -> str:
        self.expressions.variables[node] = name
        self.holders[name] = node
        return name

    def _statement(self, node: fx.Node, index: int) -> str:
        of = self.expressions.of
        if node.target in (decide, check_decision):
            found, expected = node.args[:2]
            if isinstance(expected, bool):
                return f"assert {of(found)}" if expected else f"assert not {of(found, 30)}"
            return f"assert {of(found, 31)} == {of(expected, 31)}"
        if node.target is operator.setitem:
            owner, key, item = node.args
            return f"{of(owner, 100)}[{self.expressions.key(key)}] = {of(item)}"
        if node.target in _IN_PLACE and (name := self._written_in(node, index)) is not None:
            sign = INFIX[_IN_PLACE[node.target]][0]
            self.expressions.variables[node] = name
            return f"{name} {sign}= {of(node.args[1])}"
        if in_place_method(node) and (name := self._held_by(node.args[0])) is not None:
            text, _ = self.expressions.written(node)
            self.expressions.variables[node] = name
            return self._moved(node, text)
        if node.target is unpack:
            return self._unpacking(node, index)
        text, _ = self.expressions.written(node)
        if not self.users[node]:
            return text
        return f"{self._bind(node, self._variable(node, index))} = {text}"

    def _moved(self, node: fx.Node, text: str) -> str:
        """After a write in place a name stands for the value written to, for as long as either is used."""
        source = node.args[0]
        later = max(self.last.get(node, -1), self.last.get(source, -1))  # type: ignore[arg-type]
        self.last[node] = self.last[source] = later  # type: ignore[index]
        self.holders[self.expressions.variables[node]] = node
        return text

    def _held_by(self, source: Any) -> str | None:
        return self.expressions.variables.get(source) if isinstance(source, fx.Node) else None

    def _written_in(self, node: fx.Node, index: int) -> str | None:
        """The name that `name += value` is about; None where Python would leave the old value as it is."""
        source: Any = node.args[0]
        name = self._held_by(source)
        if name is None or self.last.get(source, -1) > index:
            return None
        self.holders[name] = node
        return name

    def _unpacking(self, node: fx.Node, index: int) -> str:
        source, count = node.args
        items: list[str] = ["_"] * int(count)  # type: ignore[call-overload]
        text = self.expressions.of(source)
        for user in self.users[node]:
            items[user.args[1]] = self._bind(user, self._variable(user, index))  # type: ignore[call-overload]
        return f"{', '.join(items)}{',' if len(items) == 1 else ''} = {text}"

    def _variable(self, node: fx.Node, index: int) -> str:
        """A name for a value: the site's output, what the rule's code calls it, or else its operation."""
        known = self._name(node) or self._name_after_writes(node)
        if node.meta.get("output"):
            return self._free("y", index, again=True)
        if known is not None:
            return self._free(known.text, index, again=known.assigned)
        target = node.args[1] if node.target is getattr else node.target
        if target is operator.getitem and isinstance(node.args[1], str) and node.args[1].isidentifier():
            return self._free(identifier(node.args[1]), index, again=True)  # input_ids = new["input_ids"]
        if any(user.target is base_forward and node in _wrappers(user) for user in self.users[node]):
            return self._free("around", index, again=False)
        words = {
            operator.getitem: "item",
            "to": "cast",
            **dict.fromkeys((same_dtype, in_dtype, weighted, detached), "changed"),
        }
        text = words.get(target) or (target if isinstance(target, str) else getattr(target, "__name__", "value"))
        if node.op == "call_module":
            text = next((part for part in reversed(text.split(".")) if not part.isdigit()), text)
        return self._free(identifier(str(text).strip("_") or "value"), index, again=False)

    def _name_after_writes(self, node: fx.Node) -> VariableName | None:
        """What the code calls a value that it writes to: `hidden *= gate` is the last line that gives this name."""
        for user in self.users[node]:
            if (user.target in _IN_PLACE or in_place_method(user)) and _first_operand(user) is node:
                return self._name(user) or self._name_after_writes(user)
        return None

    def _free(self, name: str, index: int, again: bool) -> str:
        """This name, or one with a number where it stands for something else that is used yet."""
        number, found = 1, name
        while found in self.holders:
            holder = self.holders[found]
            if again and holder is not None and self.last.get(holder, -1) <= index:
                break
            number += 1
            found = f"{name}_{number}"
        return found

    def to_split(self, lines: Sequence[tuple[fx.Node, Line]]) -> set[fx.Node]:
        """Of each line that is too long, the longest value in it that makes a good line by itself."""
        found = set()
        for node, line in lines:
            if len(line.text) > WIDTH and (inner := self._written_inside(node) - {cast(Any, self.result.args[0])}):
                lengths = {one: len(self.expressions.written(one)[0]) for one in inner}
                good = [one for one in inner if lengths[one] <= GOOD]
                found.add(max(good, key=lengths.__getitem__) if good else min(inner, key=lengths.__getitem__))
        return found

    def _written_inside(self, node: fx.Node) -> set[Any]:
        found, waiting = set[Any](), [node]
        while waiting:
            inner = [operand for operand in operands(waiting.pop()) if operand in self.within]
            found.update(inner)
            waiting += inner
        return found


def _first_operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else None


ANY = "?"  # the origin of a line that needs no other comment than the one before it


def _wrappers(node: fx.Node) -> Any:
    """The functions around those that a forward takes from a registry, of a call of `base_forward`."""
    return node.args[6] if len(node.args) > 6 else ()
