"""PEFT's `n_frequency_pattern` and `block_size_pattern`, which PEFT matches in another way than `rank_pattern`.

A pattern of these fields must follow a dot of the path, or be the whole path. Of several patterns that match, the first
that follows a dot counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from surgery import PeftConfig, PeftMethod, Rule
from surgery.rules._shared.path_patterns import first


class PathValuesMethod(PeftMethod):
    """A method with a number for each path. `pattern`: PEFT's and the rule's field; `number`: that of other paths."""

    number: ClassVar[str]
    pattern: ClassVar[str]

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        patterns = config.take(self.pattern, {})
        fitting, value_at = config.fitting(self.pattern), value_in_peft(patterns, None)
        values = {path: value_at(path) for path in sorted(config.targeted)} if patterns else {}
        if all(first(fitting, path, None) == value for path, value in values.items()):
            return {self.pattern: fitting}
        paths_of: dict[Any, list[str]] = {}
        for path, value in values.items():
            if value is not None:
                paths_of.setdefault(value, []).append(re.escape(path))
        return {self.pattern: {f"^(?:{'|'.join(paths)})": value for value, paths in paths_of.items()} or None}

    def write(self, placed: Sequence[tuple[Rule, Sequence[str]]], modules: Any) -> dict[str, Any]:
        config = super().write(placed, modules)  # refuses more than one rule
        rule, paths = placed[0]
        patterns, usual = dict(getattr(rule, self.pattern) or {}), getattr(rule, self.number)
        values, value_at = {path: first(patterns, path, usual) for path in paths}, value_in_peft(patterns, usual)
        if any(value_at(path) != value for path, value in values.items()):
            nested = sorted(paths, key=lambda path: "." not in path)  # a key without a dot matches nested paths, too
            patterns = {_key_of(path): values[path] for path in nested}
        return {**config, self.pattern: patterns}


def value_in_peft(patterns: Mapping[str, Any], usual: Any) -> Callable[[str], Any]:
    """Returns a function from a path to its value in PEFT."""
    forms = [(key, re.compile(rf".*\.{key}$")) for key in patterns]
    return lambda path: patterns.get(next((key for key, form in forms if form.match(path)), path), usual)


def _key_of(path: str) -> str:
    """Returns a pattern that PEFT matches with this path alone; of a path without a dot, with its endings, too."""
    parent, dot, name = path.rpartition(".")
    return rf"(?<=^{re.escape(parent)}\.){re.escape(name)}" if dot else path
