"""Where the parts of a pattern fit in a graph, each answer kept: the work is at most parts × edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from surgery.structures.equivalent_ops import EXPANDED, GATHERED, Meaning, expand, gather
from surgery.structures.op_aliases import COMMUTATIVE, PASSING, CanonicalOp, Dim, Implied, NodeName, is_node
from surgery.structures.pattern_graph import PatternPart, is_constant, same_constant

__all__ = ["Search"]


@dataclass
class Search:
    """One search of one pattern in one `networkx.DiGraph`."""

    parts: list[PatternPart]
    graph: Any
    known: dict[tuple[int, Any], tuple[bool, int]] = field(default_factory=dict)  # whether it fits, operations that do

    def __post_init__(self) -> None:
        self.data: dict[Any, dict[str, Any]] = dict(self.graph.nodes(data=True))
        self.order = {node: index for index, node in enumerate(self.data)}
        self.by_operation: dict[str, list[Any]] = {}
        for node, data in self.data.items():
            self.by_operation.setdefault(data["operation"], []).append(node)
        self.above: list[list[int]] = [[] for _ in self.parts]
        for index, part in enumerate(self.parts):
            for child in part.children():
                self.above[child].append(index)
        self.sources: dict[Any, Any] = {}
        self.further: dict[Any, dict[str, Meaning]] = {}  # what nodes mean besides the operation that they are
        self.implied: dict[Any, list[Any]] = {}  # users of nodes that the graph has no edge for
        self._understand()

    # What nodes mean ----------------------------------------------------------------------------------------

    def _understand(self) -> None:
        for operation in EXPANDED & self.by_operation.keys():
            for node in list(self.by_operation[operation]):
                meaning = expand(operation, self.data[node]["operands"])
                if meaning is not None:
                    self._note(node, Meaning(meaning.operation, self._with_nodes(meaning.operands, node)))
        found = []
        for operation in GATHERED & self.by_operation.keys():
            for node in self.by_operation[operation]:
                told = self.told(node, operation)
                meaning = None if told is None or told.keywords else gather(operation, told.operands, self)
                if meaning is not None:
                    found.append((node, meaning))
        for node, meaning in found:
            self._note(node, meaning)

    def _note(self, node: Any, meaning: Meaning) -> None:
        self.further.setdefault(node, {})[meaning.operation] = meaning
        self.by_operation.setdefault(meaning.operation, []).append(node)
        for operand in meaning.operands:
            if self.has(operand):
                self.implied.setdefault(operand, []).append(node)

    def _with_nodes(self, operands: tuple[Any, ...], owner: Any) -> tuple[Any, ...]:
        """Operands with a node of its own in the place of each meaning."""
        made = []
        for operand in operands:
            if isinstance(operand, Meaning):
                node = Implied(operand.operation, owner)
                given = self._with_nodes(operand.operands, node)
                self.data[node] = {**_NO_NODE, "operation": operand.operation, "operands": given}
                self.order[node] = self.order[node.node]
                self.by_operation.setdefault(operand.operation, []).append(node)
                for below in given:
                    if self.has(below):
                        self.implied.setdefault(below, []).append(node)
                operand = node
            made.append(operand)
        return tuple(made)

    def told(self, node: Any, operation: str | None) -> CanonicalOp | None:
        """What a node is given as this operation; None where it can't be read as such."""
        data = self.data[node]
        if operation is None or data["operation"] == operation:
            return CanonicalOp(data["operation"], data["operands"], data["keywords"])
        meaning = self.further.get(node, {}).get(operation)
        return None if meaning is None else CanonicalOp(operation, meaning.operands, {})

    def within(self, node: Any, operation: str | None) -> tuple[Any, ...]:
        """The nodes besides its own that a node takes to be this operation."""
        if operation is None or self.data[node]["operation"] == operation:
            return ()
        return self.further[node][operation].within

    def users(self, node: Any) -> Iterable[Any]:
        own = (node.owner,) if isinstance(node, Implied) else self.graph.successors(node)
        return own if node not in self.implied else dict.fromkeys([*own, *self.implied[node]])

    # As `gathered` asks.

    def read(self, operand: Any, operation: str) -> Meaning | None:
        passed = []
        while self.has(operand):
            passed.append(operand)
            told = self.told(operand, operation)
            if told is not None:
                return None if told.keywords else Meaning(operation, told.operands, tuple(passed))
            operand = self.passed(operand)
        return None

    def plain(self, operand: Any) -> Any:
        return operand

    def same(self, one: Any, other: Any) -> bool:
        if self.has(one) and self.has(other):
            return self.source(one) is self.source(other) or self.source(one) == self.source(other)
        if self.has(one) or self.has(other):
            return False
        return other.is_dim(one) if isinstance(other, Dim) else same_constant(other, one)

    def items(self, operand: Any) -> tuple[Any, ...] | None:
        return operand if isinstance(operand, tuple) else None

    def is_weight(self, operand: Any, rank: int) -> bool:
        if not self.has(operand):
            return False
        data = self.data[self.source(operand)]
        return data["op"] == "get_attr" if data["shape"] is None else len(data["shape"]) == rank

    # Where to look ------------------------------------------------------------------------------------------

    def roots(self) -> list[Any]:
        """Nodes where the whole pattern may sit: above the rarest operation that it needs."""
        needed = self.needed()
        if needed:
            rarest = min(needed, key=lambda index: len(self.candidates(index)))
            starts = [(rarest, node) for node in self.candidates(rarest)]
        else:  # alternatives that have nothing in common
            starts = [
                (index, node)
                for index, part in enumerate(self.parts)
                if part.kind == "operation"
                for node in self.candidates(index)
            ]
        root, found, seen = len(self.parts) - 1, set(), set(starts)
        while starts:
            index, node = starts.pop()
            if index == root:
                found.add(node)
                continue
            for pair in self.up(index, node):
                if pair not in seen:
                    seen.add(pair)
                    starts.append(pair)
        return sorted((node for node in found if not isinstance(node, Implied)), key=self.order.__getitem__)

    def up(self, index: int, node: Any) -> Iterator[tuple[int, Any]]:
        for above in self.above[index]:
            part = self.parts[above]
            if part.kind != "operation":
                yield above, node
                continue
            for user in self.users(node):
                if self.named(part, user):
                    yield above, user
        for user in self.users(node):
            if self.data[user]["operation"] in PASSING:
                yield index, user

    def needed(self) -> set[int]:
        """Operations that are in every way to read the pattern."""
        sets: list[set[int]] = []
        for index, part in enumerate(self.parts):
            inner = [sets[child] for child in part.children()]
            if part.kind == "either":
                sets.append(set.intersection(*inner))
            else:
                sets.append(set().union(*inner, {index} if part.kind == "operation" else ()))
        return sets[-1]

    def candidates(self, index: int) -> list[Any]:
        part = self.parts[index]
        if part.operation is not None:
            return self.by_operation.get(part.operation, [])
        return [node for node in self.data if self.named(part, node)]

    def named(self, part: PatternPart, node: Any) -> bool:
        data = self.data[node]
        if part.operation is None:
            return part.is_module(data)
        return part.operation == data["operation"] or node in self.further and part.operation in self.further[node]

    # What fits ----------------------------------------------------------------------------------------------

    def fits(self, index: int, operand: Any) -> bool:
        stack, known = [(index, operand)], self.known
        while stack:
            pair = stack[-1]
            if pair in known:
                stack.pop()
                continue
            waiting = [below for way in self.ways(*pair) for below in way if below not in known]
            if waiting:
                stack.extend(waiting)
            else:
                known[pair] = self.judged(*pair)
        return known[index, operand][0]

    def judged(self, index: int, operand: Any) -> tuple[bool, int]:
        part = self.parts[index]
        if part.kind == "any":
            return part.name is None or not isinstance(operand, Implied), 0  # nothing could stand for it
        if part.kind == "const":
            return is_constant(operand) and _suits(part.value, operand), 0
        if part.kind == "constant":
            return not is_node(operand) and same_constant(part.value, operand), 0
        here = int(part.kind == "operation" and self.reached(part, operand) is not None)
        best = (False, 0)
        for way in self.ways(index, operand):
            answers = [(self.known[below], self.parts[below[0]].kind in ("constant", "const")) for below in way]
            wrong = any(plain and not fits for (fits, _), plain in answers)  # an argument of its own is another
            ok = all(fits for (fits, _), _ in answers)
            best = max(best, (ok, here - wrong + sum(count for (_, count), _ in answers)))
        if best[0] and part.asks and part.refusal(self.data[self.reached(part, operand)]):
            return False, best[1] - 1
        return best

    def ways(self, index: int, operand: Any) -> list[list[tuple[int, Any]]]:
        """The ways in which a part can fit, each as what has to fit below; empty where it can't."""
        part = self.parts[index]
        if part.kind == "either":
            return [[(below, operand)] for below in part.operands]
        if part.kind == "tuple":
            fits = isinstance(operand, tuple) and len(operand) == len(part.operands)
            return [list(zip(part.operands, operand, strict=True))] if fits else []
        if part.kind != "operation" or (node := self.reached(part, operand)) is None:
            return []
        data = self.data[node]
        given, keywords = data["operands"], data["keywords"]
        if part.operation is not None and part.operation != data["operation"]:
            given, keywords = self.further[node][part.operation].operands, {}
        if part.mismatch(given, keywords):
            return []
        named = [(below, keywords[name]) for name, below in part.keywords]
        ways = [[*((below, given[slot]) for slot, below in part.slotted()), *named]]
        if part.operation in COMMUTATIVE and len(given) == 2:
            ways.append([*((below, given[1 - slot]) for slot, below in part.slotted()), *named])
        return ways

    def reached(self, part: PatternPart, operand: Any) -> Any:
        """The node of a part's operation, past what only hands a value on; None where it is another operation."""
        if not self.has(operand):
            return None
        if not self.named(part, operand):
            if part.operation in PASSING or part.operation is None:
                while not self.named(part, operand):
                    before = self.passed(operand)
                    if before is None:
                        return None
                    operand = before
                return operand
            operand = self.source(operand)
        return operand if self.named(part, operand) else None

    def has(self, operand: Any) -> bool:
        return isinstance(operand, _NODES) and operand in self.data

    def passed(self, node: Any) -> Any:
        """What a node hands on, or None."""
        data = self.data[node]
        first = data["operands"][0] if data["operation"] in PASSING and data["operands"] else None
        return first if self.has(first) else None

    def source(self, node: Any) -> Any:
        path = []
        while node not in self.sources and (before := self.passed(node)) is not None:
            path.append(node)
            node = before
        found = self.sources.get(node, node)
        self.sources.update(dict.fromkeys(path, found))
        return found


def _suits(where: Any, value: Any) -> bool:
    """Whether a value is as a `Const` asks; one that its function can't be asked about is not."""
    try:
        return where is None or bool(where(int(value) if isinstance(value, Dim) else value))
    except (TypeError, ValueError):
        return False


_NODES = (fx.Node, NodeName, Implied)
_NO_NODE: dict[str, Any] = {
    "op": "implied", "target": None, "keywords": {}, "path": None, "type": None, "shape": None, "dtype": None
}  # fmt: skip
