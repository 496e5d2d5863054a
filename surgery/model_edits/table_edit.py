"""`TableEdit`: one change of a dict of a module, with its inverse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["TableEdit"]


@dataclass(eq=False)
class TableEdit:
    """A change of items of one dict of an owner: its children, its parameters, its buffers or its attributes.

    >>> from torch import nn
    >>> from surgery.model_edits.table_edit import TableEdit
    >>> model = nn.Sequential(nn.ReLU())
    >>> edit = TableEdit(model, "_modules", dict(model._modules), {"0": nn.GELU()})
    >>> edit.make()
    >>> edit.undo()
    >>> type(model[0]).__name__
    'ReLU'

    It is plain data, so copies and pickles of a model keep it. A key that one of the two sides lacks does not exist on
    that side.

    Args:
        owner: a module, or another object with a `__dict__`.
        table: "_modules", "_parameters", "_buffers" or "__dict__".
        before: the items before the change. For children, all of them, so that their order comes back.
        after: the items after it.
    """

    owner: Any
    table: str
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def make(self) -> None:
        """Make the change."""
        self._set(self.before, self.after)

    def undo(self) -> None:
        """Undo the change."""
        self._set(self.after, self.before)

    @property
    def keys(self) -> set[tuple[int, str, str]]:
        """What it changes, as (id of the owner, table, key). The children of a module count as one."""
        names = {""} if self.table == "_modules" else self.before.keys() | self.after.keys()
        return {(id(self.owner), self.table, name) for name in names}

    @property
    def in_place(self) -> bool:
        """Whether the owner still has what the change put there."""
        table = getattr(self.owner, self.table)
        gone = self.before.keys() - self.after.keys()
        same = all(key in table and _is_same(table[key], value) for key, value in self.after.items())
        ordered = self.table != "_modules" or [key for key in table if key in self.after] == list(self.after)
        return same and ordered and not any(key in table for key in gone)

    def _set(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        table = getattr(self.owner, self.table)
        for key in old.keys() - new.keys():
            table.pop(key, None)
        if old.keys() == new.keys() and list(old) == list(new):
            table.update(new)
            return
        others = {key: value for key, value in table.items() if key not in old and key not in new}
        if self.table != "_modules":
            table.update(new)
            return
        table.clear()
        table.update({**new, **others})


def _is_same(present: Any, expected: Any) -> bool:
    if present is expected:
        return True
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    return isinstance(expected, plain) and type(present) is type(expected) and present == expected
