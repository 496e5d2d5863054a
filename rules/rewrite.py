"""Rewrite rules: the operations of a pattern become those of a replacement, both written in plain PyTorch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from surgery import Equivalence, Pattern, Rule, RuleError, Site, SiteError, Structure, SurgeryError, rule
from surgery.rules._rewriting.functions import accepted, call_with, is_name, name_of, resolve
from surgery.rules._rewriting.match import MatchSite, RewriteMatch, disjoint

__all__ = ["RewriteRule"]

Function = Callable[..., Any]


@rule("rewrite")
class RewriteRule(Rule):
    """Replaces the operations of a pattern by those of a replacement, wherever a forward has them.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import RewriteRule
    >>> class Attention(nn.Module):
    ...     def forward(self, q, k, v):
    ...         return torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1) @ v
    >>> def scores(q, k, v, divisor):
    ...     return torch.softmax(q @ k.mT / divisor, -1) @ v
    >>> def fused(q, k, v, divisor):
    ...     return F.scaled_dot_product_attention(q, k, v, scale=1 / divisor)
    >>> model, x = Attention(), torch.randn(2, 5, 4)
    >>> before = model(x, x, x)
    >>> _ = apply_rules(model, RewriteRule(pattern=scores, replacement=fused), example_inputs=(x, x, x))
    >>> torch.allclose(model(x, x, x), before, atol=1e-6)
    True

    The pattern is the function of a `Structure`: `one_of`, `maybe`, `Const`, `module_of` and `having` work in it. Its
    parameters are names. Where two matches overlap, the one with more operations is rewritten. The replacement gets
    what a name stands for as the argument of the same name: a tensor, a plain number, a `MatchedModule` for
    `conv=module_of(nn.Conv2d)`, or None for a name of an operation that is absent. A pattern that returns a tuple has
    several results, and its replacement returns as many. `apply_rules` needs `example_inputs`.

    Args:
        pattern: A function, or its qualified name "package.module.function".
        replacement: A function, or its qualified name. A parameter `site` gets the site, for `site.param`,
            `site.buffer` and `site.submodule`, whose tensors belong to the adapter. A parameter `match` gets the
            `RewriteMatch`.
        where: A function of a `RewriteMatch`, or its qualified name. Only matches for which it returns True are
            rewritten. A text is the reason why not, of which a warning tells. Default None: all matches.
        training: "both" (default), or "eval": in training the forward stays as it is.
        equivalent: Whether `apply_rules` compares each rewritten module with its own forward: outputs and gradients on
            the example, and on examples with more rows and another length, drawn at random. A difference that
            rounding does not explain is an error. Default True. False: the rule is meant to compute something else.
        exact: The check asks for the same bits. Default False.
        tolerance: The largest difference that the check allows, relative to the largest value of a tensor. Default
            None: computed from the dtype.
        omits: Whether a tensor of the module's output, such as attention weights, may become None. Default False.
        across_modules: Whether a match may have operations of several modules. The children between them are then a
            part of the forward that is rewritten. Default True. False: operations and layers of one forward.

    Raises:
        RuleError: The pattern can't be read, it has a parameter that it does not use, or the replacement has a
            parameter that the pattern does not have.
    """

    pattern: Function | str | None = None
    replacement: Function | str | None = None
    where: Function | str | None = None
    training: Literal["both", "eval"] = "both"
    equivalent: bool = True
    exact: bool = False
    tolerance: float | None = None
    omits: bool = False
    across_modules: bool = True

    imports = repeatable = skips_calls = skips_sites = True
    why_not_merged = "it puts other operations in the place of operations, which no weight holds"

    def validate(self) -> None:
        if not self.targets:
            object.__setattr__(self, "targets", (EVERYWHERE,))
        for field in ("pattern", "replacement", "where"):
            value = getattr(self, field)
            if not (is_name(value) or callable(value) or value is None and field == "where"):
                raise self.bad(field, "a function, or its qualified name")
        if self.training not in ("both", "eval"):
            raise self.bad("training", "'both' or 'eval'")
        for field in ("equivalent", "exact", "omits", "across_modules"):
            if not isinstance(getattr(self, field), bool):
                raise self.bad(field, "true or false")
        if self.tolerance is not None and not (isinstance(self.tolerance, (int, float)) and self.tolerance >= 0):
            raise self.bad("tolerance", "a number from 0, or None")
        if self.exact and (self.tolerance is not None or not self.equivalent):
            raise self.bad("exact", "to be had with a tolerance, or without equivalent=True")
        if callable(self.pattern) and callable(self.replacement):
            self._structure()
        for field in ("pattern", "replacement", "where"):
            if (name := name_of(getattr(self, field))) is not None:
                object.__setattr__(self, field, name)

    def _structure(self) -> Structure:
        """Returns the pattern's structure, and checks the replacement's parameters."""
        pattern, replacement = resolve(self._given("pattern")), resolve(self._given("replacement"))
        structure = structure_of(pattern)
        names, needed, _ = accepted(replacement)
        known = {*structure.names, *_EXTRAS}
        if structure.unused:
            raise RuleError(
                f"{self.label}: the pattern {_label(pattern)} does not use its parameter {structure.unused[0]}",
                why="a match could not bind it",
                fix="leave the parameter out",
            )
        missing = [name for name in needed if name not in known]
        if missing:
            raise RuleError(
                f"{self.label}: the replacement {_label(replacement)} has the parameter {missing[0]}",
                why=f"the pattern {_label(pattern)} binds {', '.join(structure.names) or 'no name'}",
                fix="name the replacement's parameters as the pattern's; `site` and `match` get the site and the match",
            )
        return structure

    @property
    def label(self) -> str:
        names = [value if isinstance(value, str) else _label(value) for value in (self.pattern, self.replacement)]
        pattern, replacement = (str(name).rpartition(".")[2] for name in names)
        return f"RewriteRule({pattern}→{replacement})"

    def _given(self, field: str) -> Function | str:
        value = getattr(self, field)
        assert value is not None  # says validate
        return value

    def check(self, module: nn.Module, path: str) -> str | None:
        self._structure()  # only now: reading a rule imports nothing
        if self.where is not None:
            resolve(self.where)
        return None

    def equivalence(self) -> Equivalence | None:
        return Equivalence(self.exact, self.tolerance, self.omits) if self.equivalent else None

    def structures(self) -> Sequence[Structure]:
        return (self._structure(),)

    def spans_modules(self) -> bool:
        return self.across_modules

    def rewrite(self, site: Site) -> Tensor | None:
        structure = self._structure()
        found = site.find(structure, leaves=False)
        matches = [RewriteMatch(site, match, tuple(structure.names), number) for number, match in enumerate(found)]
        matches = disjoint([match for match in matches if self._fits(match, site)])
        if not matches:
            return NotImplemented
        replacement = resolve(self._given("replacement"))
        fitting, edited = 0, False
        for match in matches:
            if (why := site.objection(match.found, called=False)) is None:
                values: Mapping[str, Any] = {**match, "site": MatchSite(site, match.number), "match": match}
                new = self._results(call_with(replacement, values), match)
                why = site.objection(match.found)
            if why is not None:
                site.warn(f"leaves a match as it is: {why}")
                continue
            fitting += 1
            if self.training == "eval" and site.training:
                continue
            if (why := site.lost_passage(match.found)) is not None:
                mode = " in training" if site.training else ""
                site.warn(f"leaves a match as it is{mode}: {why} (training='eval' says so without a warning)")
                continue
            site.replace_match(match.found, new)
            edited = True
        if not fitting:
            return NotImplemented
        return None if edited else site.output

    def _results(self, new: Any, match: RewriteMatch) -> tuple[Any, ...]:
        """Returns the replacement's results, as many as the pattern has."""
        count = len(match.found.roots)
        if count > 1 and not isinstance(new, (tuple, list, type(None))):
            new = tuple(new[index] for index in range(count))  # such as the result of a chunk
        results = (new,) if count == 1 and not isinstance(new, (tuple, list)) else new
        if not isinstance(results, (tuple, list)) or len(results) != count or any(item is None for item in results):
            returned = f"{len(results)} results" if isinstance(results, (tuple, list)) else f"{new!r}"
            raise SiteError(
                f"{self.label}: the replacement returned {returned}, and the pattern has {count}",
                where=match.path or "the model itself",
                fix="return one value for each result of the pattern",
            )
        return tuple(results)

    def _fits(self, match: RewriteMatch, site: Site) -> bool:
        if not self.across_modules and len(match.modules) > 1:
            return False
        fits = self.where is None or resolve(self.where)(match)
        if isinstance(fits, str):
            site.warn(f"leaves a match as it is: {fits}")
            return False
        return bool(fits)


def structure_of(pattern: Function) -> Structure:
    """Returns the structure of a pattern's function. Raises `RuleError` with the reason if it is not a pattern."""
    if pattern not in _structures:
        try:
            _structures[pattern] = Structure(pattern)
        except SurgeryError as error:
            raise RuleError(f"{_label(pattern)} is not a pattern", why=_reason(error), fix=error.fix) from error
    return _structures[pattern]


def _reason(error: SurgeryError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what


def _label(function: Function | None) -> str:
    return getattr(function, "__qualname__", repr(function))


EVERYWHERE = Pattern.type(nn.Module)
_EXTRAS = ("site", "match")
_structures: weakref.WeakKeyDictionary[Function, Structure] = weakref.WeakKeyDictionary()
