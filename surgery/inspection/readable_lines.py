"""Writes a graph as lines of code, each with its variable names and the rule that it comes from."""

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
from surgery.inspection.readable_graph import blocks_of, in_place_method, operands, region_of
from surgery.inspection.statement_choice import IN_PLACE, StatementChoice, first_operand
from surgery.inspection.variable_names import VariableName
from surgery.tracing.decisions import check_decision, decide

__all__ = ["ANY", "WIDTH", "Line", "lines_of"]

WIDTH = 100  # the largest width of a line without indentation; in wider lines, a value gets a line of its own
GOOD = 80  # the largest width of such a value


@dataclass(frozen=True)
class Line:
    """A statement, its rule ("": the module's own forward), and the blocks around it as text for `with`."""

    text: str
    origin: str
    blocks: str = ""


def lines_of(
    graph: fx.Graph,
    expressions: Expressions,
    parameters: Mapping[str, str],
    names: Mapping[tuple[int, int], VariableName],
) -> list[Line]:
    """The lines of a graph. `parameters`: the variables of the adapters' tensors by path; earlier lines assign them."""
    split: set[fx.Node] = set()
    while True:
        writer = _LineWriter(StatementChoice(graph, names, split), expressions, parameters)
        lines = list(writer.lines())
        if not (more := writer.to_split(lines) - split):
            return [line for _, line in lines]
        split |= more


class _LineWriter:
    """Writes the lines of the chosen statements, and gives their values variable names."""

    def __init__(self, choice: StatementChoice, expressions: Expressions, parameters: Mapping[str, str]):
        self.choice, self.expressions, self.parameters = choice, expressions, parameters
        self.holders: dict[str, fx.Node | None] = {}  # the value that each variable holds; None: a name that is in use
        self.last: dict[fx.Node, int] = {}  # the index of the last line that uses a value

    def lines(self) -> Iterator[tuple[fx.Node, Line]]:
        """Yield each statement and the `return`, with their nodes."""
        statements = self.choice.statements()
        self._last_uses([*statements, self.choice.result])
        self._name_functions()
        self.holders = dict.fromkeys(self.expressions.names.used)
        for node in self.choice.nodes:
            if node.op == "placeholder":
                self._bind(node, str(node.target).lstrip("*"))
            elif node.op == "get_attr" and str(node.target) in self.parameters:
                self._bind(node, self.parameters[str(node.target)])
        for name in self.parameters.values():
            self.holders.setdefault(name, None)
        for index, node in enumerate(statements):
            yield node, Line(self._statement(node, index), node.meta.get("surgery", ""), blocks_of(region_of(node)))
        value = self.expressions.text(self.choice.result.args[0])
        origin = next(
            (n.meta.get("surgery", "") for n in operands(self.choice.result) if n in self.choice.inlined), None
        )
        yield self.choice.result, Line(f"return {value}", ANY if origin is None else origin)

    def _name_functions(self) -> None:
        """Write each node once, which fixes the names of all functions, so that variables avoid them."""
        variables = self.expressions.variables
        variables.update(dict.fromkeys(self.choice.nodes, "_"))
        for node in self.choice.nodes:
            if node.op != "output":
                self.expressions.node_text(node)
        variables.clear()

    def _last_uses(self, statements: Sequence[fx.Node]) -> None:
        """Note the last line that uses each value, also if an inlined value of that line uses it."""
        self.last = {}
        for index, statement in enumerate(statements):
            waiting = [statement]
            while waiting:
                for operand in operands(waiting.pop()):
                    self.last[operand] = index
                    if operand in self.choice.inlined or operand in self.choice.repeated:
                        waiting.append(operand)

    def _bind(self, node: fx.Node, name: str) -> str:
        self.expressions.variables[node] = name
        self.holders[name] = node
        return name

    def _statement(self, node: fx.Node, index: int) -> str:
        """The text of a statement; it notes the variable of the statement's value."""
        text_of = self.expressions.text
        if node.target in (decide, check_decision):
            decision, expected = node.args[:2]
            if isinstance(expected, bool):
                return f"assert {text_of(decision)}" if expected else f"assert not {text_of(decision, 30)}"
            return f"assert {text_of(decision, 31)} == {text_of(expected, 31)}"
        if node.target is operator.setitem:
            owner, key, item = node.args
            return f"{text_of(owner, 100)}[{self.expressions.key_text(key)}] = {text_of(item)}"
        if node.target in IN_PLACE and (name := self._augmented_name(node, index)) is not None:
            sign = INFIX[IN_PLACE[node.target]][0]
            self.expressions.variables[node] = name
            return f"{name} {sign}= {text_of(node.args[1])}"
        if in_place_method(node) and (name := self._variable_of(node.args[0])) is not None:
            text, _ = self.expressions.node_text(node)
            self.expressions.variables[node] = name
            return self._rebind(node, text)
        if node.target is unpack:
            return self._unpacking(node, index)
        text, _ = self.expressions.node_text(node)
        if not self.choice.users[node]:
            return text
        return f"{self._bind(node, self._new_variable(node, index))} = {text}"

    def _rebind(self, node: fx.Node, text: str) -> str:
        """Let a variable hold the value after a write in place, until the last use of the old or new value."""
        source = node.args[0]
        later = max(self.last.get(node, -1), self.last.get(source, -1))  # type: ignore[arg-type]
        self.last[node] = self.last[source] = later  # type: ignore[index]
        self.holders[self.expressions.variables[node]] = node
        return text

    def _variable_of(self, source: Any) -> str | None:
        return self.expressions.variables.get(source) if isinstance(source, fx.Node) else None

    def _augmented_name(self, node: fx.Node, index: int) -> str | None:
        """The variable for a line `name += value`; None if a later line still uses the old value."""
        source: Any = node.args[0]
        name = self._variable_of(source)
        if name is None or self.last.get(source, -1) > index:
            return None
        self.holders[name] = node
        return name

    def _unpacking(self, node: fx.Node, index: int) -> str:
        source, count = node.args
        items: list[str] = ["_"] * int(count)  # type: ignore[call-overload]
        text = self.expressions.text(source)
        for user in self.choice.users[node]:
            items[user.args[1]] = self._bind(user, self._new_variable(user, index))  # type: ignore[call-overload]
        return f"{', '.join(items)}{',' if len(items) == 1 else ''} = {text}"

    def _new_variable(self, node: fx.Node, index: int) -> str:
        """A variable: `y` for the site's output, else the name in the rule's code, else the operation's name."""
        code_name = self.choice.variable_name(node) or self._name_after_writes(node)
        if node.meta.get("output"):
            return self._free("y", index, again=True)
        if code_name is not None:
            return self._free(code_name.text, index, again=code_name.assigned)
        target = node.args[1] if node.target is getattr else node.target
        if target is operator.getitem and isinstance(node.args[1], str) and node.args[1].isidentifier():
            return self._free(identifier(node.args[1]), index, again=True)  # input_ids = new["input_ids"]
        if any(user.target is base_forward and node in _wrappers(user) for user in self.choice.users[node]):
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
        """The name of a value that the code writes to in place: `hidden *= gate` names it only at the write."""
        for user in self.choice.users[node]:
            if (user.target in IN_PLACE or in_place_method(user)) and first_operand(user) is node:
                return self.choice.variable_name(user) or self._name_after_writes(user)
        return None

    def _free(self, name: str, index: int, again: bool) -> str:
        """This name, or the name with a number if a variable of this name is still used. `again`: may be reassigned."""
        number, candidate = 1, name
        while candidate in self.holders:
            holder = self.holders[candidate]
            if again and holder is not None and self.last.get(holder, -1) <= index:
                break
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def to_split(self, lines: Sequence[tuple[fx.Node, Line]]) -> set[fx.Node]:
        """For each line that is too wide, the inlined value that gets a line: the longest with at most GOOD letters."""
        values = set()
        for node, line in lines:
            if len(line.text) > WIDTH and (
                inner := self.choice.written_inside(node) - {cast(Any, self.choice.result.args[0])}
            ):
                lengths = {value: len(self.expressions.node_text(value)[0]) for value in inner}
                good = [value for value in inner if lengths[value] <= GOOD]
                values.add(max(good, key=lengths.__getitem__) if good else min(inner, key=lengths.__getitem__))
        return values


ANY = "?"  # the origin of a line that fits under any comment, such as a `return` of a variable


def _wrappers(node: fx.Node) -> Any:
    """The functions around those that a forward takes from a registry, of a call of `base_forward`."""
    return node.args[6] if len(node.args) > 6 else ()
