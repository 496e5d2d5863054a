"""Patterns: conditions on one module, with the reason why each clause holds or fails.

A pattern is data: it can be compared, printed and written as JSON. A type is stored as its qualified name and
compared with the names of a module's classes, so reading a pattern never imports code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.errors import RuleError, qualified_name
from surgery.patterns.own_entries import own_parameter

__all__ = ["Candidate", "Pattern", "Verdict", "type_named"]


@dataclass(frozen=True)
class Candidate:
    """The module that a pattern is tested on, with its path, its parent and the model's output heads."""

    path: str
    module: nn.Module
    heads: frozenset[int] = frozenset()
    parent: nn.Module | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of testing a pattern: true if it matches. Prints as the tree of its clauses with reasons."""

    ok: bool
    clause: str
    reason: str
    parts: tuple[Verdict, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterable[str]:
        yield f"{'yes' if self.ok else 'no '}  {self.clause}: {self.reason}"
        for part in self.parts:
            yield from ("     " + line for line in part._lines())


class Pattern:
    """A condition on one module, built from clauses with `&`, `|` and `~`.

    >>> from torch import nn
    >>> from surgery import Pattern
    >>> attention = Pattern.type(nn.Linear) & (Pattern.name("query") | Pattern.name("value"))
    >>> bool(attention.match("encoder.layer.0.query", nn.Linear(2, 2)))
    True
    >>> print((~Pattern.has_parameter("bias")).match("query", nn.Linear(2, 2)))
    no   not has_parameter('bias'): its clause holds
         yes  has_parameter('bias'): Linear has the parameter bias

    Clauses: `type` (isinstance), `name` (as in PEFT: the full path, or its end after a dot; `re:` starts a
    regular expression for the full path), `has_parameter`, and `where` (any predicate on the module).

    Note:
        A pattern with `where` can't be written to JSON.
    """

    @staticmethod
    def type(of: type[nn.Module] | str) -> Pattern:
        """Match instances of a class, subclasses included.

        >>> from torch import nn
        >>> from surgery import Pattern
        >>> bool(Pattern.type("torch.nn.Linear").match("query", nn.Linear(2, 2)))
        True

        Args:
            of: The class, or its qualified name.
        """
        return _Type(of if isinstance(of, str) else qualified_name(of))

    @staticmethod
    def name(text: str) -> Pattern:
        """Match paths that equal `text` or end with `"." + text`.

        >>> from torch import nn
        >>> from surgery import Pattern
        >>> bool(Pattern.name(r"re:layers\\.[02]\\.query").match("layers.2.query", nn.Linear(2, 2)))
        True

        Args:
            text: A name or a path. After `re:`, a regular expression that must match the whole path.

        Raises:
            RuleError: The regular expression is invalid.
        """
        return _NamePattern(text)

    @staticmethod
    def has_parameter(name: str) -> Pattern:
        """Match modules with a parameter of this name that is not None. The parameters of children do not count."""
        return _HasParameter(name)

    @staticmethod
    def where(predicate: Callable[[nn.Module], bool], label: str = "") -> Pattern:
        """Match modules for which `predicate(module)` is true.

        Args:
            predicate: Called with the module. A `RuleError` reports its exceptions.
            label: The predicate's name in reports. Default: the function's name.
        """
        return _Where(predicate, label or getattr(predicate, "__name__", "predicate"))

    def match(self, path: str, module: nn.Module) -> Verdict:
        """Test the pattern on one module.

        Args:
            path: The module's path in the model.
            module: The module.

        Returns:
            A verdict that is true if the pattern matches. It prints as the tree of clauses with their reasons.
        """
        return self.verdict(Candidate(path, module))

    def verdict(self, candidate: Candidate) -> Verdict:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Convert the pattern to plain data for JSON or YAML. `Pattern.from_dict` gives an equal pattern back.

        Raises:
            RuleError: The pattern contains a `where`.
        """
        raise NotImplementedError

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Pattern:
        """Read a pattern from the data of `to_dict`. Raises `RuleError` for other data."""
        if len(data) != 1:
            raise RuleError(f"a pattern is a mapping with one key, not {dict(data)!r}", fix=_FORMS)
        kind, value = next(iter(data.items()))
        if kind in ("type", "name", "has_parameter") and isinstance(value, str):
            return {"type": _Type, "name": _NamePattern, "has_parameter": _HasParameter}[kind](value)
        if kind in ("all", "any") and isinstance(value, list):
            return (_All if kind == "all" else _Any)(tuple(Pattern.from_dict(part) for part in value))
        if kind == "not" and isinstance(value, Mapping):
            return _Not(Pattern.from_dict(value))
        raise RuleError(f"{kind!r}: {value!r} is not a pattern", fix=_FORMS)

    def __and__(self, other: Pattern) -> Pattern:
        return _All(_flat(_All, self) + _flat(_All, other))

    def __or__(self, other: Pattern) -> Pattern:
        return _Any(_flat(_Any, self) + _flat(_Any, other))

    def __invert__(self) -> Pattern:
        return _Not(self)


_FORMS = "write {type: …}, {name: …}, {has_parameter: …}, {all: […]}, {any: […]} or {not: …}"


@dataclass(frozen=True)
class _Type(Pattern):
    of: str

    def verdict(self, candidate: Candidate) -> Verdict:
        ancestry = [qualified_name(cls) for cls in type(candidate.module).__mro__]
        ok = self.of in ancestry or _canonical(self.of) in ancestry
        return Verdict(ok, str(self), f"it is a {ancestry[0]}")

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.of}

    def __str__(self) -> str:
        return f"type({self.of})"


@dataclass(frozen=True)
class _NamePattern(Pattern):
    text: str

    def __post_init__(self) -> None:
        if self.text.startswith("re:"):
            try:
                re.compile(self.text[3:])
            except re.error as error:
                raise RuleError(
                    f"{self.text!r} is not a regular expression", why=str(error), fix="escape the special characters"
                ) from None

    def verdict(self, candidate: Candidate) -> Verdict:
        path = candidate.path
        if self.text.startswith("re:"):
            ok = path != "" and re.fullmatch(self.text[3:], path) is not None
        else:
            ok = path == self.text or (self.text != "" and path.endswith("." + self.text))
        return Verdict(ok, str(self), f"its path is {path or '(the model itself)'}")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.text}

    def __str__(self) -> str:
        return f"name({self.text!r})"


@dataclass(frozen=True)
class _HasParameter(Pattern):
    name_: str

    def verdict(self, candidate: Candidate) -> Verdict:
        ok = own_parameter(candidate.module, self.name_) is not None
        return Verdict(
            ok, str(self), f"{type(candidate.module).__name__} has {'the' if ok else 'no'} parameter {self.name_}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"has_parameter": self.name_}

    def __str__(self) -> str:
        return f"has_parameter({self.name_!r})"


@dataclass(frozen=True)
class _Where(Pattern):
    predicate: Callable[[nn.Module], bool]
    label: str = field(compare=False, default="")

    def verdict(self, candidate: Candidate) -> Verdict:
        try:
            ok = bool(self.predicate(candidate.module))
        except Exception as error:
            raise RuleError(
                f"{self} fails at {candidate.path or '(the model itself)'}",
                why=f"{type(error).__name__}: {error}, on a {type(candidate.module).__name__}",
                fix="put Pattern.type(…) & before it",
            ) from error
        return Verdict(ok, str(self), "the predicate holds" if ok else "the predicate does not hold")

    def to_dict(self) -> dict[str, Any]:
        raise RuleError(
            f"{self} can't be written",
            why="a Python function is not data",
            fix="say it with Pattern.type, .name and .has_parameter, or build the rule in code",
        )

    def __str__(self) -> str:
        return f"where({self.label})"


@dataclass(frozen=True)
class _All(Pattern):
    parts: tuple[Pattern, ...]

    def verdict(self, candidate: Candidate) -> Verdict:
        verdicts: tuple[Verdict, ...] = ()
        for part in self.parts:
            if isinstance(part, _Where) and not all(verdicts):
                # A predicate may rely on earlier clauses: type(Linear) & where(lambda m: m.in_features > 8).
                verdicts += (Verdict(False, str(part), "not tested, because an earlier clause fails"),)
            else:
                verdicts += (part.verdict(candidate),)
        missing = [verdict.clause for verdict in verdicts if not verdict]
        return Verdict(
            not missing, "all of", "fails at " + ", ".join(missing) if missing else "every clause holds", verdicts
        )

    def to_dict(self) -> dict[str, Any]:
        return {"all": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return "(" + " & ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class _Any(Pattern):
    parts: tuple[Pattern, ...]

    def verdict(self, candidate: Candidate) -> Verdict:
        verdicts = tuple(part.verdict(candidate) for part in self.parts)
        holds = [verdict.clause for verdict in verdicts if verdict]
        return Verdict(bool(holds), "any of", ", ".join(holds) + " holds" if holds else "no clause holds", verdicts)

    def to_dict(self) -> dict[str, Any]:
        return {"any": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return "(" + " | ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class _Not(Pattern):
    part: Pattern

    def verdict(self, candidate: Candidate) -> Verdict:
        inner = self.part.verdict(candidate)
        return Verdict(not inner, f"not {self.part}", "its clause holds" if inner else "its clause fails", (inner,))

    def to_dict(self) -> dict[str, Any]:
        return {"not": self.part.to_dict()}

    def __str__(self) -> str:
        return f"~{self.part}"


def type_named(target: str | Pattern) -> str | None:
    """Returns the class name of a `Pattern.type`; None for other targets."""
    return target.of if isinstance(target, _Type) else None


def _canonical(name: str) -> str:
    """Resolve a public name in imported modules: `torch.nn.Linear` → `torch.nn.modules.linear.Linear`."""
    module, _, attribute = name.rpartition(".")
    cls = getattr(sys.modules.get(module), attribute, None)
    return qualified_name(cls) if isinstance(cls, type) else name


def _flat(kind: type, pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, kind) and isinstance(pattern, (_All, _Any)) else (pattern,)
