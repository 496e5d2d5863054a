"""Writes values that parameters alone give as short formulas: (4·w1_a w1_b) ⊙ (w2_a w2_b)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from surgery.inspection.readable_graph import operands

__all__ = ["Formulas", "is_fact", "name_of", "number", "passes_through", "symbol", "untransposed"]

LONGEST = 34  # characters of a formula; a longer part becomes f(its parameters)
_ATOM, _TIGHT, _PRODUCT, _SUM = 3, 2, 1, 0

_SYMBOLS = {
    "weight": "W", "bias": "b", "lambda_": "Λ", "gamma": "Γ", "theta": "θ", "alpha": "α", "delta": "ΔW",
    "magnitude": "m", "lora_bias": "b",
}  # fmt: skip
_CASTS = {
    "to", "type_as", "float", "double", "half", "bfloat16", "same_dtype", "in_dtype", "in_dtype_of", "cast_like",
    "detach", "detached", "hidden_of", "contiguous",
}  # fmt: skip
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "expand", "expand_as", "unsqueeze", "squeeze", "view_as", "reshape_as",
}  # fmt: skip
_TURNS = {"transpose", "t", "permute", "mT", "T", "swapaxes", "movedim"}
_FACTS = {"dtype", "shape", "device", "ndim", "is_cuda", "requires_grad", "size", "dim", "numel"}
_SIGNS: dict[str, tuple[str, int]] = {
    "add": (" + ", _SUM), "iadd": (" + ", _SUM), "sub": (" − ", _SUM), "mul": (" ⊙ ", _PRODUCT),
    "imul": (" ⊙ ", _PRODUCT), "matmul": (" ", _TIGHT), "kron": (" ⊗ ", _PRODUCT), "truediv": (" / ", _PRODUCT),
    "div": (" / ", _PRODUCT), "eq": (" = ", _SUM), "mm": (" ", _TIGHT), "bmm": (" ", _TIGHT),
}  # fmt: skip


def name_of(node: fx.Node) -> str:
    """The short name of what a node calls."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", None) or type(node.target).__name__
    return str(name).strip("_") or str(name)


def symbol(name: str) -> str:
    """A tensor's name as a paper writes it."""
    return _SYMBOLS.get(name, name)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_fact(node: fx.Node) -> bool:
    """Whether a node reads a dtype, a shape or a device, and so is not a tensor."""
    if node.target is getattr and len(node.args) > 1:
        return node.args[1] in _FACTS
    if node.op == "call_method" and node.target in _FACTS:
        return True
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(source, fx.Node) and is_fact(source)


def passes_through(node: fx.Node, own: bool = False) -> bool:
    """Whether a node only casts its value or gives it another shape. `own`: in a module's own forward, or turns it."""
    if node.op not in ("call_method", "call_function") or node.target is getattr:
        return False
    name = name_of(node)
    return name in _CASTS or name in _VIEWS or name == "with_hidden" or own and name in _TURNS


def untransposed(node: fx.Node) -> tuple[fx.Node, int]:
    """The value before casts, changes of shape and transpositions, and how often it is transposed."""
    flips = 0
    while isinstance(source := node.args[0] if node.args else None, fx.Node) and passes_through(node, own=True):
        flips += name_of(node) in _TURNS
        node = source
    return node, flips


class Formulas:
    """Writes nodes as formulas.

    `leaf`: the text of a node that is not written out, or None. `counts`: whether f(…) lists it.
    """

    def __init__(self, leaf: Callable[[fx.Node], str | None], counts: Callable[[fx.Node], bool]):
        self.leaf, self.counts = leaf, counts

    def text(self, node: fx.Node) -> str:
        return self._text(node)[0]

    def leaves(self, node: fx.Node) -> list[str]:
        """The texts of the tensors that a node is computed from, each once."""
        return list(dict.fromkeys(self._leaves(node)))

    def _leaves(self, node: fx.Node) -> Iterator[str]:
        if (text := self.leaf(node)) is not None:
            yield from [text] if text and self.counts(node) else []
        elif not is_fact(node):
            for operand in operands(node):
                yield from self._leaves(operand)

    def _text(self, value: Any) -> tuple[str, int]:
        if not isinstance(value, fx.Node):
            return number(value), _ATOM
        leaf = self.leaf(value)
        if leaf is not None:
            return leaf, _ATOM
        text, tightness = self._written(value)
        if len(text) > LONGEST:
            return f"f({', '.join(self.leaves(value))})", _ATOM
        return text, tightness

    def _tight(self, value: Any, tightness: int) -> str:
        text, found = self._text(value)
        return text if found >= tightness else f"({text})"

    def _written(self, node: fx.Node) -> tuple[str, int]:
        name = name_of(node)
        values = [value for value in node.args if not (isinstance(value, fx.Node) and is_fact(value))]
        first = values[0] if values else None
        if passes_through(node) or name in ("new_zeros", "getitem", "select", "index_select"):
            at = node.args[1] if name == "getitem" else None
            if isinstance(at, (int, fx.Node)):
                return f"{self._tight(first, _ATOM)}[{self._text(at)[0]}]", _ATOM
            return self._text(first)
        if name in _TURNS:
            text = self._tight(first, _ATOM)
            return text.removesuffix("ᵀ") if text.endswith("ᵀ") else f"{text}ᵀ", _ATOM
        if name in _SIGNS and len(values) == 2:
            return self._infix(name, *values)
        if name == "neg":
            return f"−{self._tight(first, _TIGHT)}", _PRODUCT
        if name in ("index_add", "index_copy"):
            base, *_, new = values
            entries = f"scatter({self._text(new)[0]})"
            zero = isinstance(base, fx.Node) and name_of(base) == "new_zeros"
            return (entries, _ATOM) if zero else (f"{self._tight(base, _SUM)} + {entries}", _SUM)
        texts = [self._text(value)[0] for value in operands(node) if not is_fact(value)]
        return f"{name}({', '.join(filter(None, texts))})", _ATOM

    def _infix(self, name: str, left: Any, right: Any) -> tuple[str, int]:
        sign, tightness = _SIGNS[name]
        if name == "eq":
            return f"{self._tight(left, _SUM)} = {self._tight(right, _SUM)}", _SUM
        if name in ("mul", "imul"):
            if not isinstance(right, fx.Node):
                left, right = right, left
            if not isinstance(left, fx.Node):
                return f"{number(left)}·{self._tight(right, _TIGHT)}", _TIGHT
        texts = [self._tight(side, self._inner(name, side, side is right)) for side in (left, right)]
        if all(text.startswith("f(") and text.endswith(")") for text in texts):
            return f"f({', '.join(dict.fromkeys([*self.leaves(left), *self.leaves(right)]))})", _ATOM
        return sign.join(texts), tightness

    def _inner(self, name: str, side: Any, right: bool) -> int:
        """How tightly an operand has to bind to stand without parentheses."""
        tightness = _SIGNS[name][1]
        same = isinstance(side, fx.Node) and name_of(side).removeprefix("i") == name.removeprefix("i")
        if tightness == _PRODUCT:
            return _PRODUCT if same and not right else _ATOM
        return tightness + (right and name in ("sub", "matmul", "mm", "bmm"))


def is_torchs(node: fx.Node) -> bool:
    """Whether a node calls a function or a method of torch or Python, and not one of a rule or a user."""
    if node.op == "call_method":
        return True
    module = str(getattr(node.target, "__module__", None) or "torch")
    return isinstance(node.target, torch._ops.OpOverload) or module.partition(".")[0] in (
        "torch", "_operator", "builtins", "math",
    )  # fmt: skip
