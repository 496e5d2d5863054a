"""Searches where the parts of a pattern fit in a graph. Answers are stored: the work is at most parts × edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from surgery.structures.equivalent_ops import EXPANDED, GATHERED, Meaning, expand, gather
from surgery.structures.op_aliases import COMMUTATIVE, PASSING, CanonicalOp, Dim, Implied, NodeName, is_node
from surgery.structures.pattern_part import PatternPart, is_constant, same_constant

__all__ = ["Search"]


@dataclass
class Search:
    """One search of one pattern in one `networkx.DiGraph`."""

    parts: list[PatternPart]
    graph: Any
    # (part, operand) → (whether the part fits, number of fitting operations)
    answers: dict[tuple[int, Any], tuple[bool, int]] = field(default_factory=dict)

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
        self.further: dict[Any, dict[str, Meaning]] = {}  # other operations that a node also means
        self.implied: dict[Any, list[Any]] = {}  # users of nodes without an edge in the graph
        self._understand()

    # What nodes mean ----------------------------------------------------------------------------------------

    def _understand(self) -> None:
        for operation in EXPANDED & self.by_operation.keys():
            for node in list(self.by_operation[operation]):
                meaning = expand(operation, self.data[node]["operands"])
                if meaning is not None:
                    self._note(node, Meaning(meaning.operation, self._with_nodes(meaning.operands, node)))
        meanings = []
        for operation in GATHERED & self.by_operation.keys():
            for node in self.by_operation[operation]:
                op = self.as_operation(node, operation)
                meaning = None if op is None or op.keywords else gather(operation, op.operands, self)
                if meaning is not None:
                    meanings.append((node, meaning))
        for node, meaning in meanings:
            self._note(node, meaning)

    def _note(self, node: Any, meaning: Meaning) -> None:
        self.further.setdefault(node, {})[meaning.operation] = meaning
        self.by_operation.setdefault(meaning.operation, []).append(node)
        for operand in meaning.operands:
            if self.has(operand):
                self.implied.setdefault(operand, []).append(node)

    def _with_nodes(self, operands: tuple[Any, ...], owner: Any) -> tuple[Any, ...]:
        """Replace each meaning among the operands by an implied node."""
        result = []
        for operand in operands:
            if isinstance(operand, Meaning):
                node = Implied(operand.operation, owner)
                inner = self._with_nodes(operand.operands, node)
                self.data[node] = {**_NO_NODE, "operation": operand.operation, "operands": inner}
                self.order[node] = self.order[node.node]
                self.by_operation.setdefault(operand.operation, []).append(node)
                for below in inner:
                    if self.has(below):
                        self.implied.setdefault(below, []).append(node)
                operand = node
            result.append(operand)
        return tuple(result)

    def as_operation(self, node: Any, operation: str | None) -> CanonicalOp | None:
        """Returns the node as this operation with its operands; None if the node is another operation."""
        data = self.data[node]
        if operation is None or data["operation"] == operation:
            return CanonicalOp(data["operation"], data["operands"], data["keywords"])
        meaning = self.further.get(node, {}).get(operation)
        return None if meaning is None else CanonicalOp(operation, meaning.operands, {})

    def within(self, node: Any, operation: str | None) -> tuple[Any, ...]:
        """Returns the other nodes that belong to a node when it is read as this operation."""
        if operation is None or self.data[node]["operation"] == operation:
            return ()
        return self.further[node][operation].within

    def users(self, node: Any) -> Iterable[Any]:
        users = (node.owner,) if isinstance(node, Implied) else self.graph.successors(node)
        return users if node not in self.implied else dict.fromkeys([*users, *self.implied[node]])

    # The protocol `Terms`, for `gather`.

    def read(self, operand: Any, operation: str) -> Meaning | None:
        passed = []
        while self.has(operand):
            passed.append(operand)
            op = self.as_operation(operand, operation)
            if op is not None:
                return None if op.keywords else Meaning(operation, op.operands, tuple(passed))
            operand = self.passed(operand)
        return None

    def constant(self, operand: Any) -> Any:
        return operand

    def same(self, value: Any, other: Any) -> bool:
        if self.has(value) and self.has(other):
            return self.source(value) is self.source(other) or self.source(value) == self.source(other)
        if self.has(value) or self.has(other):
            return False
        return other.is_dim(value) if isinstance(other, Dim) else same_constant(other, value)

    def items(self, operand: Any) -> tuple[Any, ...] | None:
        return operand if isinstance(operand, tuple) else None

    def is_weight(self, operand: Any, rank: int) -> bool:
        if not self.has(operand):
            return False
        data = self.data[self.source(operand)]
        return data["op"] == "get_attr" if data["shape"] is None else len(data["shape"]) == rank

    # Where to look ------------------------------------------------------------------------------------------

    def roots(self, root: int) -> list[Any]:
        """Returns the candidates for a result of the pattern: nodes above the rarest operation that it needs."""
        needed = self.needed(root)
        if needed:
            rarest = min(needed, key=lambda index: len(self.candidates(index)))
            starts = [(rarest, node) for node in self.candidates(rarest)]
        else:  # the alternatives do not share an operation
            starts = [
                (index, node)
                for index, part in enumerate(self.parts[: root + 1])
                if part.kind == "operation"
                for node in self.candidates(index)
            ]
        candidates, visited = set(), set(starts)
        while starts:
            index, node = starts.pop()
            if index == root:
                if self.computes(root, node):
                    candidates.add(node)
                continue
            for pair in self.up(index, node):
                if pair not in visited:
                    visited.add(pair)
                    starts.append(pair)
        return sorted((node for node in candidates if not isinstance(node, Implied)), key=self.order.__getitem__)

    def computes(self, root: int, node: Any) -> bool:
        """Whether a node is an operation of the result itself, and not one that only passes the result on."""
        part = self.parts[root]
        if part.kind == "either":
            return any(self.computes(below, node) for below in part.operands)
        return part.kind != "operation" or self.named(part, node)

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

    def needed(self, root: int) -> set[int]:
        """Returns the operations that every alternative of a result contains."""
        sets: list[set[int]] = []
        for index, part in enumerate(self.parts[: root + 1]):
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
        stack, answers = [(index, operand)], self.answers
        while stack:
            pair = stack[-1]
            if pair in answers:
                stack.pop()
                continue
            waiting = [below for way in self.ways(*pair) for below in way if below not in answers]
            if waiting:
                stack.extend(waiting)
            else:
                answers[pair] = self.judge(*pair)
        return answers[index, operand][0]

    def judge(self, index: int, operand: Any) -> tuple[bool, int]:
        """Returns whether a part fits an operand, and the number of fitting operations below."""
        part = self.parts[index]
        if part.kind == "any":
            return part.name is None or not isinstance(operand, Implied), 0  # an implied node is not a value to bind
        if part.kind == "const":
            return is_constant(operand) and _suits(part.value, operand), 0
        if part.kind == "constant":
            return not is_node(operand) and same_constant(part.value, operand), 0
        own_operation = int(part.kind == "operation" and self.reached(part, operand) is not None)
        best = (False, 0)
        for way in self.ways(index, operand):
            below_answers = [(self.answers[below], self.parts[below[0]].kind in ("constant", "const")) for below in way]
            wrong = any(
                constant and not fits for (fits, _), constant in below_answers
            )  # one of its plain arguments differs
            ok = all(fits for (fits, _), _ in below_answers)
            best = max(best, (ok, own_operation - wrong + sum(count for (_, count), _ in below_answers)))
        if best[0] and part.asks and part.refusal(self.data[self.reached(part, operand)]):
            return False, best[1] - 1
        return best

    def ways(self, index: int, operand: Any) -> list[list[tuple[int, Any]]]:
        """Returns the ways in which a part can fit, each as the pairs that must fit below; empty if it can't."""
        part = self.parts[index]
        if part.kind == "either":
            return [[(below, operand)] for below in part.operands]
        if part.kind == "tuple":
            fits = isinstance(operand, tuple) and len(operand) == len(part.operands)
            return [list(zip(part.operands, operand, strict=True))] if fits else []
        if part.kind != "operation" or (node := self.reached(part, operand)) is None:
            return []
        data = self.data[node]
        operands, keywords = data["operands"], data["keywords"]
        if part.operation is not None and part.operation != data["operation"]:
            operands, keywords = self.further[node][part.operation].operands, {}
        if part.mismatch(operands, keywords):
            return []
        named = [(below, keywords[name]) for name, below in part.keywords]
        ways = [[*((below, operands[slot]) for slot, below in part.slot_operands()), *named]]
        if part.operation in COMMUTATIVE and len(operands) == 2:
            ways.append([*((below, operands[1 - slot]) for slot, below in part.slot_operands()), *named])
        return ways

    def reached(self, part: PatternPart, operand: Any) -> Any:
        """Returns the node of a part's operation, past nodes that pass a value on; None for another operation."""
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
        """Returns the operand that a node passes on, or None."""
        data = self.data[node]
        first = data["operands"][0] if data["operation"] in PASSING and data["operands"] else None
        return first if self.has(first) else None

    def source(self, node: Any) -> Any:
        path = []
        while node not in self.sources and (before := self.passed(node)) is not None:
            path.append(node)
            node = before
        source = self.sources.get(node, node)
        self.sources.update(dict.fromkeys(path, source))
        return source


def _suits(where: Any, value: Any) -> bool:
    """Whether a value satisfies the function of a `Const`. A value that the function can't test does not."""
    try:
        return where is None or bool(where(int(value) if isinstance(value, Dim) else value))
    except (TypeError, ValueError):
        return False


_NODES = (fx.Node, NodeName, Implied)
_NO_NODE: dict[str, Any] = {
    "op": "implied", "target": None, "keywords": {}, "path": None, "type": None, "shape": None, "dtype": None
}  # fmt: skip
