"""The scores of attention written out: their scale, and what is added to them, in the form of torch's function.

Scores may be viewed in another shape where a mask is added, such as (batch, heads, …) for (batch · heads, …). Then the
function gets queries, keys and values in that shape, so that the mask stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrites._conditions import call_of, dropout_rate, is_broadcast, name_of_call

__all__ = ["HIDING", "Scores", "attention_objection", "fill_value"]

HIDING = ("early_hidden", "early_visible", "hidden", "visible")
_TERMS = ("early_hidden", "early_visible", "bias", "mask", "hidden", "visible")
_LOWEST = -1e4  # the largest number that hides a score: exp(-10000) is 0 in every dtype


def attention_objection(match: RewriteMatch) -> str | None:
    """Returns why torch's function does not compute a match, or None."""
    names = ("few_k", "few_v") if match["few_k"] is not None else ("k", "v")
    if match["keys_in_columns"] is not None:
        names = ("keys_in_columns", *names[1:])
    shapes = [match.shape(name) for name in ("q", *names)]
    if any(shape is None for shape in shapes):
        return "the shapes of the queries, keys and values are not known"
    if dropout_rate(match, "softmax") is None:
        return "there is a dropout or a detach at another place than after the softmax, or its rate is a tensor"
    q, k, v = (tuple(shape or ()) for shape in shapes)
    if not 3 <= len(q) == len(k) or len(v) < 3:
        return f"the queries, keys and values have {len(q)}, {len(k)} and {len(v)} dimensions"
    if match["few_k"] is None and q[:-2] != k[:-2]:
        return f"the queries are {q}, and the keys are {k}"
    return _scores_objection(match, Scores(match), v)


def _scores_objection(match: RewriteMatch, scores: Scores, v: tuple[int, ...]) -> str | None:
    for name in ("early_fill", "fill"):
        if match[name] is not None and not fill_value(match, match[name]) <= _LOWEST:
            return f"the number for hidden scores is not known to be below {_LOWEST:g}"
    if match["floor"] is not None and not fill_value(match, match["floor"]) <= _LOWEST:
        return f"the scores have a lower bound that is not known to be below {_LOWEST:g}"
    late = next((match[name] for name in ("late_scale", "late_divisor") if match[name] is not None), 1.0)
    if match["early_fill"] is not None and not (isinstance(late, (int, float)) and late > 0 and scores.late is None):
        return "scores are hidden, and then multiplied by a number that is not known to be positive"
    if scores.wrong_size is not None:
        return f"{scores.wrong_size} changes the last two dimensions of the scores"
    if len(scores.levels) > 1:
        return "the scores have several shapes when masks are added"
    if scores.levels and match["few_k"] is not None:
        return "the heads of keys are repeated, and the scores are viewed in another shape"
    if scores.levels and (why := scores.view_objection()) is not None:
        return why
    if v[:-2] not in (scores.lead, scores.target) and match["few_v"] is None:
        return f"the values are {v}, and the scores are {(*scores.lead, *scores.ends)}"
    for name in scores.present:
        shape, level = match.shape(name), scores.level_of(name)
        if not is_broadcast(shape, (*level, *scores.ends)):
            return f"{_name(match, name)}, which is {shape}, enlarges the scores"
        if level != scores.target and shape is not None and not _moves(shape[:-2], scores.lead):
            return f"{_name(match, name)}, which is {shape}, does not have a shape with {scores.target}"
    for name in ("factor", "denominator", "late_factor", "late_denominator"):
        shape = match.shape(name)
        if match[name] is None or match.is_constant(name):
            continue
        whole = shape is None or math.prod(shape) == 1 and len(shape) <= len(scores.lead) + 2  # None: a number
        columns = is_broadcast(shape, (*scores.lead, scores.ends[0], 1))
        if not whole and (not columns or name[:4] == "late" and scores.levels):
            return f"{_name(match, name)}, a factor of the scores, differs between keys"
    return None


def _name(match: RewriteMatch, name: str) -> str:
    return match.site.node_of(match[name]).name


def _moves(lead: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a term with these leading sizes can be brought into another shape: it has all of them, or none."""
    return lead == whole or all(size == 1 for size in lead)


class Scores:
    """The scores of one match.

    Attributes:
        lead: The sizes of the product of queries and keys in the example, without the last two.
        ends: The last two sizes: queries and keys.
        levels: The leading sizes, other than `lead`, of scores to which something is added.
        target: The leading sizes in which the function is called.
        wrong_size: A view that changes the last two sizes.
    """

    def __init__(self, match: RewriteMatch) -> None:
        self.match = match
        q = match.shape("q") or ()
        in_columns = match["keys_in_columns"] is not None
        k = match.shape("keys_in_columns" if in_columns else "few_k" if match["few_k"] is not None else "k") or ()
        self.lead = tuple(q[:-2])
        self.ends: tuple[int, int] = (q[-2], k[-1] if in_columns else k[-2]) if len(q) > 1 and len(k) > 1 else (0, 0)
        self.views = [] if match["few_k"] is not None else [n for n in match.nodes if name_of_call(n) in _VIEWS]
        self.wrong_size = next((node for node in self.views if self.shape_of(node)[-2:] != self.ends), None)
        self.present = [name for name in _TERMS if match[name] is not None and not match.is_constant(name)]
        self.levels = {level for name in self.present if (level := self.level_of(name)) != self.lead}
        self.target = next(iter(self.levels), self.lead)
        self.late = next((match[n] for n in ("late_factor", "late_denominator") if match[n] is not None), None)

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta.get("shape") or ())

    def level_of(self, name: str) -> tuple[int, ...]:
        """Returns the leading sizes of the scores to which a term is added."""
        term, nodes = self.match.site.node_of(self.match[name]), set(self.match.nodes)
        users = [user for user in term.users if user in nodes]
        return self.shape_of(users[0])[:-2] if users else self.lead

    def view(self) -> fx.Node:
        """Returns the operation that views the scores in the target's shape."""
        return next(node for node in self.views if self.shape_of(node)[:-2] == self.target)

    def view_objection(self) -> str | None:
        node = next((node for node in self.views if self.shape_of(node)[:-2] == self.target), None)
        if node is None or name_of_call(node) not in ("view", "reshape"):
            return "the scores are brought into the shape of a mask by another function than view and reshape"
        sizes, inner = _flat(call_of(node)[0][1:]), set(self.match.nodes)
        if any(isinstance(size, fx.Node) and _depends(size, inner) for size in sizes):
            return f"the sizes of {node} are computed from the scores"
        return None

    def sizes(self) -> list[Any]:
        """Returns the target's leading sizes as values of the forward."""
        sizes, count, site = _flat(call_of(self.view())[0][1:]), len(self.target), self.match.site
        if len(sizes) == 1 and isinstance(sizes[0], fx.Node):  # a torch.Size
            return [site.at(sizes[0])[index] for index in range(count)]
        return [site.at(size) if isinstance(size, fx.Node) else size for size in sizes[:count]]

    def scaled(self, q: Any) -> tuple[Any, float]:
        """Returns the queries with the factors that are tensors, and the product of those that are numbers."""
        match, scale = self.match, 1.0
        for factor, divisor in (("scale", "divisor"), ("late_scale", "late_divisor")):
            scale *= match[factor] if match[factor] is not None else 1.0
            scale /= match[divisor] if match[divisor] is not None else 1.0
        for factor, divisor in (("factor", "denominator"), ("late_factor", "late_denominator")):
            q = q * self._in_dtype(factor) if match[factor] is not None else q
            q = q / self._in_dtype(divisor) if match[divisor] is not None else q
        return q, scale

    def mask(self) -> Any:
        """Returns the sum of what is added to the scores, in the dtype of the queries; None without any."""
        match = self.match
        total = self._plus(self._filled(None, "early"), "bias")
        if total is not None:
            for factor, divisor in (("late_scale", "late_divisor"), ("late_factor", "late_denominator")):
                total = total * self._in_dtype(factor) if match[factor] is not None else total
                total = total / self._in_dtype(divisor) if match[divisor] is not None else total
        total = self._filled(self._plus(total, "mask"), "")
        if total is not None and len(self.target) == 1 and self._rank == 3:
            return total.unsqueeze(0)
        return total

    def moved(self, x: Any, name: str) -> Any:
        """Returns queries, keys or values with the target's leading sizes, and at least two of these."""
        if self.levels and (self.match.shape(name) or ())[:-2] != self.target:
            x = x.reshape(*self.sizes(), x.size(-2), x.size(-1))
        return x.unsqueeze(0) if len(self.target) == 1 else x  # the fast kernels take four dimensions

    def moved_back(self, x: Any, values: Any, name: str) -> Any:
        """Returns the result of the function with the leading sizes that the forward's has: those of the values."""
        x = x.squeeze(0) if len(self.target) == 1 else x
        lead = (self.match.shape(name) or ())[:-2]
        if self.levels and lead != self.target:
            x = x.reshape(*[values.size(index) for index in range(len(lead))], x.size(-2), x.size(-1))
        return x

    @property
    def _rank(self) -> int:
        """The number of dimensions of the mask."""
        ranks = [len(self.match.shape(name) or ()) for name in self.present if self.level_of(name) == self.target]
        return max(ranks, default=2)

    def _plus(self, total: Any, name: str) -> Any:
        if name not in self.present:  # a number that is added to all scores changes nothing
            return total
        return self._term(name) if total is None else total + self._term(name)

    def _filled(self, total: Any, prefix: str) -> Any:
        hidden, visible, fill = (f"{prefix}_{name}".strip("_") for name in ("hidden", "visible", "fill"))
        if self.match[fill] is None:
            return total
        mask = self._term(hidden) if self.match[hidden] is not None else ~self._term(visible)
        total = self.match["q"].new_zeros(()) if total is None else total
        return total.masked_fill(mask, fill_value(self.match, self.match[fill]))

    def _term(self, name: str) -> Any:
        """Returns a term, in the target's shape and in the dtype of the queries."""
        value, shape = self._in_dtype(name), self.match.shape(name) or ()
        if self.level_of(name) == self.target or len(shape) <= 2:
            return value
        lead = [] if math.prod(shape[:-2]) == 1 else self.sizes()
        return value.reshape(*lead, value.size(-2), value.size(-1))

    def _in_dtype(self, name: str) -> Any:
        value, dtype = self.match[name], self.match.dtype(name)
        wanted = self.match.dtype("q")
        return value.to(wanted) if dtype not in (None, wanted, torch.bool) else value


def fill_value(match: RewriteMatch, value: Any) -> float:
    """Returns a number, or that of a tensor which the forward makes from one; NaN if it is not known."""
    if isinstance(value, (int, float)):
        return float(value)
    if not hasattr(type(value), "__torch_function__"):
        return math.nan
    node = match.site.node_of(value)
    while name_of_call(node) in ("to", "type_as", "expand", "float"):
        node = node.all_input_nodes[0]
    args, kwargs = call_of(node)
    position = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2, "new_tensor": 1}
    place = position.get(name_of_call(node), -1)
    number = kwargs.get("fill_value", args[place] if 0 <= place < len(args) else None)
    return float(number) if isinstance(number, (int, float)) else math.nan


_VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as")


def _flat(sizes: tuple[Any, ...]) -> list[Any]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


def _depends(node: fx.Node, inner: set[fx.Node]) -> bool:
    """Whether a node is computed from one of these."""
    waiting, visited = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        if current in inner:
            return True
        if current not in visited:
            visited.add(current)
            waiting += current.all_input_nodes
    return False
