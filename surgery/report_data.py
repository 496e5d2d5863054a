"""`Report`: results as plain data: a dict, JSON text, or rows for a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

__all__ = ["Report", "plain"]


class Report:
    """A base class of results. `to_dict` is plain data, `to_json` is its text, and `to_rows` is for tables.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Count(Report):
    ...     sites: int
    >>> Count(3).to_dict(), Count(3).to_json(indent=None), Count(3).to_rows()
    ({'sites': 3}, '{"sites": 3}', [{'sites': 3}])
    """

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: mappings, lists, texts and numbers."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # reports are dataclasses
        return {field.name: plain(getattr(self, field.name)) for field in fields}

    def to_json(self, indent: int | None = 2) -> str:
        """The text of `to_dict` as JSON. Numbers that JSON does not have are the texts "nan", "inf" and "-inf"."""
        return json.dumps(plain(self.to_dict()), indent=indent, ensure_ascii=False)

    def to_rows(self) -> list[dict[str, Any]]:
        """Rows with the same columns, each a text, a number or None: `pandas.DataFrame(report.to_rows())`."""
        return [{name: value for name, value in self.to_dict().items() if not isinstance(value, (dict, list))}]


def plain(value: Any) -> Any:
    """A value as JSON data. Rules become their mapping; an object without a form as data becomes its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if callable(to_dict := getattr(value, "to_dict", None)):
        from surgery.errors import RuleError

        try:
            return plain(to_dict())
        except RuleError:  # a rule with a function in a pattern is not data
            return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)
