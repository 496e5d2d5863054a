"""The texts of boxes: names and shapes of tensors, formulas, and numbers with the fields of the rule they come from."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from surgery.inspection.readable_graph import operands
from surgery.pictures.figure import Owner
from surgery.pictures.formula import Formulas, is_fact, is_torchs, name_of, number, symbol, untransposed
from surgery.state.records import Applied, SiteState

__all__ = ["BoxText", "Tensors", "is_plain_step"]

SHORT = 22  # characters of a formula that is a box's title
WIDE = 34  # characters of a further line
_MAPS = {"linear", "addmm", "matmul", "mm", "bmm", "einsum", "conv1d", "conv2d", "conv3d", "embedding"}
_JOINED = {"mul": "⊙", "imul": "⊙", "add": "+", "iadd": "+", "sub": "−", "truediv": "/", "div": "/"}


def is_plain_step(node: fx.Node) -> bool:
    """Whether a node calls torch, so that its tensors are shown inside its box."""
    return node.op in ("call_function", "call_method") and is_torchs(node)


class Tensors:
    """The tensors that a site's graph names: shapes, adapters, and whether they train."""

    def __init__(self, module: nn.Module, state: SiteState):
        self.module = module
        self.rules = {
            f"adapters.{applied.adapter}.{name}": applied for applied in state.applied for name in applied.tensors
        }

    def value(self, name: str) -> Any:
        value: Any = self.module
        for part in name.split("."):
            value = getattr(value, part, None)
        return value

    def owner(self, name: str) -> Owner | None:
        applied = self.rules.get(name)
        return Owner(applied.adapter, applied.rule.label) if applied is not None else None

    def trains(self, name: str) -> bool:
        applied = self.rules.get(name)
        if applied is not None:
            return name.rpartition(".")[2] in applied.trained
        return bool(getattr(self.value(name), "requires_grad", False))

    def shown(self, name: str) -> str:
        """A tensor's symbol; "" for what is not a tensor."""
        return symbol(name.rpartition(".")[2]) if isinstance(self.value(name), Tensor) else ""

    def counts(self, name: str) -> bool:
        """Whether a tensor is worth its shape: an adapter's whole numbers are positions."""
        value = self.value(name)
        if not isinstance(value, Tensor):
            return False
        return value.is_floating_point() or value.is_complex() or name not in self.rules

    def shape(self, name: str) -> str:
        value = self.value(name)
        return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else ""

    def names_in(self, node: fx.Node, flowing: Mapping[fx.Node, fx.Node]) -> list[str]:
        """The tensors that a node's own formulas use: not those of the values that flow into it."""
        return list(dict.fromkeys(self._names_in(node, flowing)))

    def _names_in(self, node: fx.Node, flowing: Mapping[fx.Node, fx.Node]) -> Iterator[str]:
        for operand in operands(node):
            if operand.op == "get_attr":
                yield from [str(operand.target)] if isinstance(self.value(str(operand.target)), Tensor) else []
            elif operand not in flowing and not is_fact(operand):
                yield from self._names_in(operand, flowing)


class BoxText:
    """Writes the title and the further lines of boxes.

    `flowing`: the step whose value a node passes on. `letters`: one-letter variables of the rules' code, by step.
    """

    def __init__(self, tensors: Tensors, flowing: Mapping[fx.Node, fx.Node], letters: Mapping[Any, str]):
        self.tensors, self.flowing, self.letters = tensors, flowing, letters
        self.formulas = Formulas(self._leaf, self._counts)

    def _counts(self, node: fx.Node) -> bool:
        return node.op != "get_attr" or self.tensors.counts(str(node.target))

    def _leaf(self, node: fx.Node) -> str | None:
        if node.op == "get_attr":
            return self.tensors.shown(str(node.target))
        return "x" if node in self.flowing else None

    def _fused(self, host: fx.Node, group: Sequence[fx.Node]) -> tuple[str, tuple[str, ...]]:
        """The texts of a box of several steps, which are written out; the values that flow in are x₁, x₂, …"""
        inputs = [self.flowing[v] for part in group for v in operands(part) if v in self.flowing and not is_fact(v)]
        inputs = [step for step in dict.fromkeys(inputs) if step not in group]
        letters = {step: f"x{'₁₂₃₄₅₆₇₈₉'[n % 9]}" if len(inputs) > 1 else "x" for n, step in enumerate(inputs)}

        def leaf(node: fx.Node) -> str | None:
            step = self.flowing.get(node)
            return self._leaf(node) if step is None else None if step in group else letters.get(step, "x")

        names = list(dict.fromkeys(name for part in group for name in self.tensors.names_in(part, self.flowing)))
        return Formulas(leaf, self._counts).text(host), self._shapes(names)

    def step(self, node: fx.Node, group: Sequence[fx.Node], rule: Applied | None) -> tuple[str, tuple[str, ...]]:
        """The title and the lines of a step, with the small steps of its group."""
        if len(group) > 1:
            return self._fused(node, group)
        name = name_of(node)
        if node.op == "call_module":
            child = self.tensors.value(str(node.target))
            return str(node.target), (type(child).__name__,)
        values = [value for value in node.args if not (isinstance(value, fx.Node) and is_fact(value))]
        if name in ("addmm", "baddbmm"):  # the bias comes first
            values = [*values[1:], *values[:1]]
        weights = [value for value in values if isinstance(value, fx.Node) and self._is_formula(value)]
        if name in _MAPS and weights and is_torchs(node):
            return self._map(name, node, values, weights)
        if name in _JOINED and is_torchs(node) and len(values) == 2:
            return self._joined(name, node, values, weights, rule)
        if not is_plain_step(node):
            return name, ()
        names = self.tensors.names_in(node, self.flowing)
        if name == "getitem" and weights:
            text = self.formulas.text(weights[0])
            return (
                text if len(text) <= SHORT else f"f({', '.join(self.formulas.leaves(weights[0]))})"
            ) + "[x]", self._shapes(names)
        constants = [*values, *(node.kwargs[key] for key in ("p", "dim") if key in node.kwargs)]
        texts = [number(value) for value in constants if type(value) in (int, float)]
        return " ".join([name, *texts[:2]]), self._shapes(names)

    def _is_formula(self, node: fx.Node) -> bool:
        return node not in self.flowing and not is_fact(node)

    def _map(
        self, name: str, node: fx.Node, values: Sequence[Any], weights: Sequence[fx.Node]
    ) -> tuple[str, tuple[str, ...]]:
        weight = weights[0]
        biases = [*weights[1:], *(v for k, v in node.kwargs.items() if k == "bias" and v is not None)]
        turned = name in ("matmul", "mm", "bmm", "addmm") and len(values) > 1 and values[1] is weight
        title, details = self._formula(weight, turned)
        if biases and isinstance(biases[0], fx.Node):
            text = self.formulas.text(biases[0])
            details = (*details[:-1], f"{details[-1]}, + {text}") if details else (f"+ {text}",)
            owners = [self.tensors.owner(name) for name in self._names(weight)]
            if any(self.tensors.owner(name) is not None for name in self._names(biases[0])) and not any(owners):
                details = (*details, f"{text} is the adapter's")
        if name == "embedding":
            details = ("rows of " + details[0], *details[1:]) if details else ("rows",)
        elif name.startswith("conv"):
            details = (name, *details)
        return title, details

    def _formula(self, weight: fx.Node, turned: bool = False) -> tuple[str, tuple[str, ...]]:
        """A formula as a title, or below it if it is long; and the shapes of its tensors."""
        text = self.formulas.text(weight)
        names = self._names(weight)
        shapes = self._shapes(names)
        base, flips = untransposed(weight)
        letter = self.letters.get(base.meta.get("step"))
        if letter is not None and base.op == "call_function" and base.target is not operator.mul:
            return letter + "ᵀ" * ((flips + turned) % 2), (
                f"{letter} = {self.formulas.text(base)}",
                *self._shapes(names, True),
            )
        atom = all(sign not in text for sign in (" ", "·"))
        if turned:
            text = text.removesuffix("ᵀ") if text.endswith("ᵀ") else f"{text}ᵀ" if atom else f"({text})ᵀ"
        if len(text) <= SHORT:
            return text, shapes
        added = all(self.tensors.owner(name) is not None for name in names)
        return ("ΔW" if added else f"f({', '.join(self.formulas.leaves(weight))})"), (text, *shapes)

    def _names(self, node: fx.Node) -> list[str]:
        return [str(node.target)] if node.op == "get_attr" else self.tensors.names_in(node, self.flowing)

    def _joined(
        self, name: str, node: fx.Node, values: Sequence[Any], weights: Sequence[fx.Node], rule: Applied | None
    ) -> tuple[str, tuple[str, ...]]:
        if weights:
            text = self.formulas.text(weights[0])
            names = self._names(weights[0])
            left = values[0] is weights[0] and name in ("sub", "truediv", "div")
            title = f"{text} {_JOINED[name]}" if left else f"{_JOINED[name]} {text}"
            return title, self._shapes(names)
        constant = next((value for value in values if not isinstance(value, fx.Node)), None)
        if constant is None:
            return _JOINED[name], ()
        sign = "·" if name in ("mul", "imul") else _JOINED[name]
        reason = _reason(rule, constant) if rule is not None and sign == "·" else None
        return f"{sign} {number(constant)}", (reason,) if reason else ()

    def tensors_box(self, step: fx.Node, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """The title and the lines of the adapter tensors that a function takes."""
        formulas = [operand for operand in operands(step) if self._is_formula(operand) and operand.op != "get_attr"]
        shown = [name for name in names if self.tensors.counts(name)] or list(names)
        if len(formulas) == 1 and (text := self.formulas.text(formulas[0])) and len(text) <= WIDE:
            return text, self._shapes(shown)
        last = [name.rpartition(".")[2] for name in shown]
        if len(shown) == 1:
            return symbol(last[0]), (self.tensors.shape(shown[0]),)
        return ", ".join(last[:2]) + (", …" if len(last) > 2 else ""), self._shapes(shown)

    def _shapes(self, names: Sequence[str], named: bool = False) -> tuple[str, ...]:
        """The shapes of tensors, in as few lines as fit; of one tensor without its name, if it is not to be `named`."""
        names = [name for name in names if self.tensors.counts(name)]
        if len(names) == 1 and not named:
            return (self.tensors.shape(names[0]) or "one number",)
        texts = [f"{self.tensors.shown(n) or n.rpartition('.')[2]} {self.tensors.shape(n)}".strip() for n in names]
        lines: list[str] = []
        for text in texts:
            if lines and len(lines[-1]) + len(text) + 2 <= 26:
                lines[-1] += f", {text}"
            elif len(lines) < 3:
                lines.append(text)
            else:
                return (*lines[:-1], lines[-1] + ", …")
        return tuple(lines)


def _reason(applied: Applied, factor: Any) -> str | None:
    """Where a rule's factor comes from: α / r = 16 / 8, a field of this value, the adapter's weight, or several."""
    if not _is_number(factor):
        return None
    weight = applied.weight
    if weight != 1.0 and factor == weight:
        return "the adapter's weight"
    if weight not in (0.0, 1.0) and (text := _source(applied.rule, factor / weight)) is not None:
        return f"{text}, weight {weight:g}"
    return _source(applied.rule, factor)


def _source(rule: Any, factor: float) -> str | None:
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    alphas = [values.get("alpha"), *(values.get("alpha_pattern") or {}).values()]
    ranks = [values.get("rank"), *(values.get("rank_pattern") or {}).values()]
    for alpha, rank in itertools.product(filter(_is_number, alphas), filter(_is_number, ranks)):
        if math.isclose(factor, alpha / rank, rel_tol=1e-4):
            return f"α / r = {number(alpha)} / {number(rank)}"
        if math.isclose(factor, alpha / math.sqrt(rank), rel_tol=1e-4):
            return f"α / √r = {number(alpha)} / √{number(rank)}"
    names = [name for name, value in values.items() if _is_number(value) and value == factor]
    return next((name for name in names if "scal" in name), None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
