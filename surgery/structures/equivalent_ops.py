"""Rewrites operations as equivalent others: einsum, addmm and similar, linear, and a softmax written as exp and sum.

`expand` turns one operation into several: `baddbmm(c, a, b)` into `add(c, matmul(a, b))`. `gather` turns several
into one: `exp(x) / exp(x).sum(dim, keepdim=True)` into `softmax(x, dim)`. Graphs and patterns use the same rules, so
both forms match. This file contains only exact equivalences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

__all__ = ["EXPANDED", "GATHERED", "Meaning", "Terms", "equation_of", "expand", "gather"]


class Meaning(NamedTuple):
    """An operation whose operands may be meanings, too. `within`: further nodes that belong to it."""

    operation: str
    operands: tuple[Any, ...]
    within: tuple[Any, ...] = ()


class Terms(Protocol):
    """How `gather` reads the operands of a graph or of a pattern."""

    def read(self, operand: Any, operation: str) -> Meaning | None:
        """Reads an operand as the result of this operation, past nodes that pass a value on (listed in `within`)."""
        ...

    def constant(self, operand: Any) -> Any:
        """Returns the plain value of an operand that has one, else the operand."""
        ...

    def same(self, value: Any, other: Any) -> bool:
        """Whether two operands are the same value."""
        ...

    def items(self, operand: Any) -> tuple[Any, ...] | None:
        """Returns the items of an operand that is a tuple, else None."""
        ...

    def is_weight(self, operand: Any, rank: int) -> bool:
        """Whether an operand is a parameter, or its known rank is this one."""
        ...


# One operation → several ------------------------------------------------------------------------------------------

_SUMS = {"addmm", "baddbmm", "addbmm", "addmv"}
EXPANDED = frozenset({*_SUMS, "einsum", "linear"})


def expand(operation: str, operands: tuple[Any, ...]) -> Meaning | None:
    """Returns the operations that an operation consists of, or None."""
    if operation in _SUMS and len(operands) >= 3:
        first, left, right, beta, alpha = (*operands, None, None)[:5]
        product = Meaning("matmul", (left, right))
        if operation == "addbmm":
            product = Meaning("sum", (product, 0))
        if not _is_one(alpha):
            product = Meaning("mul", (product, alpha))
        if isinstance(beta, (int, float)) and beta == 0:  # torch then ignores the input, also its NaN
            return product
        return Meaning("add", (first if _is_one(beta) else Meaning("mul", (first, beta)), product))
    if operation == "linear" and len(operands) in (2, 3):
        first, weight, bias = (*operands, None)[:3]
        product = Meaning("matmul", (first, Meaning("mT", (weight,))))
        return product if bias is None else Meaning("add", (product, bias))
    return _product(operands) if operation == "einsum" else None


def _is_one(factor: Any) -> bool:
    return factor is None or isinstance(factor, (int, float)) and factor == 1


def equation_of(equation: Any) -> Any:
    """Normalise an einsum equation: its letters in alphabetical order, and its result written out."""
    if not isinstance(equation, str) or equation.count("->") > 1:
        return equation
    equation = equation.replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    letters = [letter for letter in inputs if letter.isalpha()]
    if not arrow:
        result = "..." * ("..." in inputs) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    names = {letter: chr(ord("a") + index) for index, letter in enumerate(dict.fromkeys(letters))}
    return "".join(names.get(letter, letter) for letter in f"{inputs}->{result}")


def _product(operands: tuple[Any, ...]) -> Meaning | None:
    """Returns the matmul that an einsum of two operands computes, with transposed operands where needed, or None."""
    equation, *factors = operands
    if len(factors) == 1 and isinstance(factors[0], tuple):
        factors = list(factors[0])
    equation = equation_of(equation)
    if not isinstance(equation, str) or len(factors) != 2:
        return None
    inputs, _, result = equation.partition("->")
    both = [_labels(part) for part in inputs.split(",")]
    out = _labels(result)
    if len(both) != 2 or out is None or any(part is None or len(part) != len(set(part)) for part in both):
        return None
    left_labels, right_labels = both
    assert left_labels is not None and right_labels is not None
    batch = [label for label in out if label in left_labels and label in right_labels]
    summed = [label for label in left_labels if label in right_labels and label not in out]
    free = [label for label in out if label not in batch and label != _MORE]
    if len(summed) != 1 or set(out) != {*left_labels, *right_labels} - {summed[0]}:
        return None
    if _MORE in (*left_labels, *right_labels) and _MORE not in batch:
        batch = [_MORE, *batch]
    if len(free) == 2 and out == [*batch, *free]:
        if free[0] in right_labels:
            left_labels, right_labels, factors = right_labels, left_labels, factors[::-1]
        rows, columns = [free[0]], [free[1]]
    elif len(free) < 2 and not batch and out == free:  # with a vector
        rows, columns = [x for x in free if x in left_labels], [x for x in free if x in right_labels]
    else:
        return None
    left = _transpose(factors[0], left_labels, batch, [*rows, *summed])
    right = _transpose(factors[1], right_labels, batch, [*summed, *columns])
    return None if left is None or right is None else Meaning("matmul", (left, right))


_MORE = "..."


def _labels(text: str) -> list[str] | None:
    before, more, after = text.partition(_MORE)
    labels = [*before, *[_MORE][: len(more)], *after]
    return labels if all(label == _MORE or label.isalpha() for label in labels) else None


def _transpose(factor: Any, labels: list[str], batch: list[str], last: list[str]) -> Any:
    """Returns an operand of the matmul, transposed if needed; None if its dimensions have another order."""
    heads = [batch, [label for label in batch if label != _MORE]] if batch == [_MORE] else [batch]
    if any(labels == [*head, *last] for head in heads):
        return factor
    reversed_labels = any(labels == [*head, *reversed(last)] for head in heads)
    return Meaning("mT", (factor,)) if reversed_labels and len(last) == 2 else None


# Several operations → one -----------------------------------------------------------------------------------------

GATHERED = frozenset({"div", "exp", "add", "matmul"})


def gather(operation: str, operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """Returns the single operation that this operation and its operands compute together, or None."""
    if operation == "div" and len(operands) == 2:
        return _softmax(operands, terms)
    if operation == "exp":
        return _softmax_by_logarithm(operands, terms)
    if operation == "matmul" and len(operands) == 2:
        weight = terms.read(operands[1], "mT")
        if weight is not None and terms.is_weight(weight.operands[0], 2):
            return Meaning("linear", (operands[0], weight.operands[0]), weight.within)
    if operation == "add" and len(operands) == 2:
        for product, bias in (operands, operands[::-1]):
            inner = terms.read(product, "matmul")
            linear = None if inner is None else gather("matmul", inner.operands, terms)
            if inner is not None and linear is not None and terms.is_weight(bias, 1):
                return Meaning("linear", (*linear.operands, bias), (*inner.within, *linear.within))
    return None


def _softmax(operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """Recognise exp(x) / exp(x).sum(dim, keepdim=True), also with the maximum of x subtracted first."""
    powers, total = terms.read(operands[0], "exp"), terms.read(operands[1], "sum")
    if powers is None or total is None or not _keeps(total.operands, terms):
        return None
    again = terms.read(total.operands[0], "exp")
    if again is None or not terms.same(again.operands[0], powers.operands[0]):
        return None
    dim = _single_dim(total.operands[1], terms)
    if dim is None:
        return None
    x, within = powers.operands[0], (*powers.within, *total.within, *again.within)
    difference = terms.read(x, "sub")
    top = None if difference is None or len(difference.operands) != 2 else _maximum(difference.operands, dim, terms)
    if difference is not None and top is not None:
        x, within = difference.operands[0], (*within, *difference.within, *top)
    return Meaning("softmax", (x, dim), within)


def _softmax_by_logarithm(operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """Recognise exp(log_softmax(x, dim)) and exp(x - logsumexp(x, dim, keepdim=True))."""
    logarithm = terms.read(operands[0], "log_softmax")
    if logarithm is not None and len(logarithm.operands) == 2:
        return Meaning("softmax", logarithm.operands, logarithm.within)
    difference = terms.read(operands[0], "sub")
    if difference is None or len(difference.operands) != 2:
        return None
    total = terms.read(difference.operands[1], "logsumexp")
    if total is None or not _keeps(total.operands, terms) or not terms.same(total.operands[0], difference.operands[0]):
        return None
    dim = _single_dim(total.operands[1], terms)
    return None if dim is None else Meaning("softmax", (total.operands[0], dim), (*difference.within, *total.within))


def _maximum(operands: tuple[Any, ...], dim: Any, terms: Terms) -> tuple[Any, ...] | None:
    """Returns the nodes of the maximum, if the second operand is the maximum of the first; else None."""
    x, top = operands
    within: tuple[Any, ...] = ()
    for name, expected in (("getitem", 0), ("getattr", "values")):  # torch.max with a dim returns a pair
        part = terms.read(top, name)
        if part is not None and len(part.operands) == 2 and terms.constant(part.operands[1]) == expected:
            top, within = part.operands[0], part.within
    for name in ("amax", "max"):
        maximum = terms.read(top, name)
        if maximum is None or not terms.same(maximum.operands[0], x):
            continue
        whole = len(maximum.operands) == 1
        if whole or _keeps(maximum.operands, terms) and terms.same(_single_dim(maximum.operands[1], terms), dim):
            return (*within, *maximum.within)
    return None


def _keeps(operands: Sequence[Any], terms: Terms) -> bool:
    return len(operands) == 3 and terms.constant(operands[2]) is True


def _single_dim(operand: Any, terms: Terms) -> Any:
    """Returns the dimension of an operand that names exactly one, else None."""
    items = terms.items(operand)
    dim = operand if items is None else items[0] if len(items) == 1 else None
    return None if dim is None or terms.constant(dim) is None else dim
