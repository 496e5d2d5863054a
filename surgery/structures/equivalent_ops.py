"""What one operation means in terms of others: einsum, addmm and their like, linear, and a softmax that is written out.

`expanded` turns one operation into several: `baddbmm(c, a, b)` into `add(c, matmul(a, b))`. `gathered` turns several
into one: `exp(x) / exp(x).sum(dim, keepdim=True)` into `softmax(x, dim)`. Graphs and patterns go by the same rules, so
both ways of writing match. Only what means exactly the same is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

__all__ = ["EXPANDED", "GATHERED", "Meaning", "Terms", "equation_of", "expand", "gather"]


class Meaning(NamedTuple):
    """An operation; its operands may be meanings, too. `within`: nodes that belong to it besides its own."""

    operation: str
    operands: tuple[Any, ...]
    within: tuple[Any, ...] = ()


class Terms(Protocol):
    """How `gathered` looks at operands: of a graph, or of a pattern."""

    def read(self, operand: Any, operation: str) -> Meaning | None:
        """An operand as the result of this operation, past what only hands a value on; `within`: all those nodes."""
        ...

    def plain(self, operand: Any) -> Any:
        """The plain value that an operand is, or the operand."""
        ...

    def same(self, one: Any, other: Any) -> bool:
        """Whether two operands are the same value."""
        ...

    def items(self, operand: Any) -> tuple[Any, ...] | None:
        """The items of an operand that is a tuple."""
        ...

    def is_weight(self, operand: Any, rank: int) -> bool:
        """Whether an operand is a parameter, or known to be of this rank."""
        ...


# One operation → several ------------------------------------------------------------------------------------------

_SUMS = {"addmm", "baddbmm", "addbmm", "addmv"}
EXPANDED = frozenset({*_SUMS, "einsum", "linear"})


def expand(operation: str, operands: tuple[Any, ...]) -> Meaning | None:
    """The operations that one consists of, or None."""
    if operation in _SUMS and len(operands) >= 3:
        given, left, right, beta, alpha = (*operands, None, None)[:5]
        product = Meaning("matmul", (left, right))
        if operation == "addbmm":
            product = Meaning("sum", (product, 0))
        if not _is_one(alpha):
            product = Meaning("mul", (product, alpha))
        if isinstance(beta, (int, float)) and beta == 0:  # then torch leaves the input out, whatever is in it
            return product
        return Meaning("add", (given if _is_one(beta) else Meaning("mul", (given, beta)), product))
    if operation == "linear" and len(operands) in (2, 3):
        given, weight, bias = (*operands, None)[:3]
        product = Meaning("matmul", (given, Meaning("mT", (weight,))))
        return product if bias is None else Meaning("add", (product, bias))
    return _product(operands) if operation == "einsum" else None


def _is_one(factor: Any) -> bool:
    return factor is None or isinstance(factor, (int, float)) and factor == 1


def equation_of(equation: Any) -> Any:
    """An equation of einsum with its letters in the order of the alphabet and its result said."""
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
    """An einsum of two operands that is their matmul, one of them or both transposed in their last dimensions."""
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
    one, other = both
    assert one is not None and other is not None
    batch = [label for label in out if label in one and label in other]
    summed = [label for label in one if label in other and label not in out]
    free = [label for label in out if label not in batch and label != _MORE]
    if len(summed) != 1 or set(out) != {*one, *other} - {summed[0]}:
        return None
    if _MORE in (*one, *other) and _MORE not in batch:
        batch = [_MORE, *batch]
    if len(free) == 2 and out == [*batch, *free]:
        if free[0] in other:
            one, other, factors = other, one, factors[::-1]
        rows, columns = [free[0]], [free[1]]
    elif len(free) < 2 and not batch and out == free:  # with a vector
        rows, columns = [x for x in free if x in one], [x for x in free if x in other]
    else:
        return None
    left = _turned(factors[0], one, batch, [*rows, *summed])
    right = _turned(factors[1], other, batch, [*summed, *columns])
    return None if left is None or right is None else Meaning("matmul", (left, right))


_MORE = "..."


def _labels(text: str) -> list[str] | None:
    before, more, after = text.partition(_MORE)
    labels = [*before, *[_MORE][: len(more)], *after]
    return labels if all(label == _MORE or label.isalpha() for label in labels) else None


def _turned(factor: Any, labels: list[str], batch: list[str], last: list[str]) -> Any:
    """An operand of the matmul: as it is, or transposed; None where its dimensions stand otherwise."""
    heads = [batch, [label for label in batch if label != _MORE]] if batch == [_MORE] else [batch]
    if any(labels == [*head, *last] for head in heads):
        return factor
    turned = any(labels == [*head, *reversed(last)] for head in heads)
    return Meaning("mT", (factor,)) if turned and len(last) == 2 else None


# Several operations → one -----------------------------------------------------------------------------------------

GATHERED = frozenset({"div", "exp", "add", "matmul"})


def gather(operation: str, operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """The one operation that this one and those below it come to, or None."""
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
            found = None if inner is None else gather("matmul", inner.operands, terms)
            if inner is not None and found is not None and terms.is_weight(bias, 1):
                return Meaning("linear", (*found.operands, bias), (*inner.within, *found.within))
    return None


def _softmax(operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """exp(x) / exp(x).sum(dim, keepdim=True), with or without x's maximum taken off first."""
    powers, total = terms.read(operands[0], "exp"), terms.read(operands[1], "sum")
    if powers is None or total is None or not _keeps(total.operands, terms):
        return None
    again = terms.read(total.operands[0], "exp")
    if again is None or not terms.same(again.operands[0], powers.operands[0]):
        return None
    dim = _one(total.operands[1], terms)
    if dim is None:
        return None
    x, within = powers.operands[0], (*powers.within, *total.within, *again.within)
    lowered = terms.read(x, "sub")
    top = None if lowered is None or len(lowered.operands) != 2 else _maximum(lowered.operands, dim, terms)
    if lowered is not None and top is not None:
        x, within = lowered.operands[0], (*within, *lowered.within, *top)
    return Meaning("softmax", (x, dim), within)


def _softmax_by_logarithm(operands: tuple[Any, ...], terms: Terms) -> Meaning | None:
    """exp(log_softmax(x, dim)), or exp(x - logsumexp(x, dim, keepdim=True))."""
    logarithm = terms.read(operands[0], "log_softmax")
    if logarithm is not None and len(logarithm.operands) == 2:
        return Meaning("softmax", logarithm.operands, logarithm.within)
    lowered = terms.read(operands[0], "sub")
    if lowered is None or len(lowered.operands) != 2:
        return None
    total = terms.read(lowered.operands[1], "logsumexp")
    if total is None or not _keeps(total.operands, terms) or not terms.same(total.operands[0], lowered.operands[0]):
        return None
    dim = _one(total.operands[1], terms)
    return None if dim is None else Meaning("softmax", (total.operands[0], dim), (*lowered.within, *total.within))


def _maximum(operands: tuple[Any, ...], dim: Any, terms: Terms) -> tuple[Any, ...] | None:
    """The nodes of the maximum of the first operand, which is the second one; None where it is not."""
    x, top = operands
    within: tuple[Any, ...] = ()
    for name, wanted in (("getitem", 0), ("getattr", "values")):  # of what torch.max gives with a dim
        part = terms.read(top, name)
        if part is not None and len(part.operands) == 2 and terms.plain(part.operands[1]) == wanted:
            top, within = part.operands[0], part.within
    for name in ("amax", "max"):
        found = terms.read(top, name)
        if found is None or not terms.same(found.operands[0], x):
            continue
        whole = len(found.operands) == 1
        if whole or _keeps(found.operands, terms) and terms.same(_one(found.operands[1], terms), dim):
            return (*within, *found.within)
    return None


def _keeps(operands: Sequence[Any], terms: Terms) -> bool:
    return len(operands) == 3 and terms.plain(operands[2]) is True


def _one(operand: Any, terms: Terms) -> Any:
    """The one dimension that is given, or None."""
    items = terms.items(operand)
    found = operand if items is None else items[0] if len(items) == 1 else None
    return None if found is None or terms.plain(found) is None else found
