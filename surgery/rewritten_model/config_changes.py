"""Carries changes of a configuration over, which other code made while a structural rule had a copy in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.model_edits.module_copy import is_config
from surgery.state.restructuring import Restructuring
from surgery.transaction.undo_log import ABSENT, Journal

__all__ = ["carry_config_changes", "note_configs"]


def note_configs(record: Restructuring) -> None:
    """Note the fields of the configurations that a structural rule has put in place."""
    attributes = [edit for edit in record.edits if edit.table == "__dict__"]
    pairs = dict(pair for edit in attributes for pair in _pairs(edit.before, edit.after))
    record.configs = [(old, new, copy.deepcopy(_fields(new))) for old, new in pairs.values()]


def carry_config_changes(record: Restructuring, journal: Journal) -> None:
    """Set fields of the former configurations that were set on the present ones since.

    Fields that the rule itself changed are its own: a call may have set them for the new structure.
    """
    for old, new, noted in record.configs:
        former, present = _fields(old), _fields(new)
        for name in present.keys() | noted.keys():
            own = former.get(name, ABSENT) != noted.get(name, ABSENT)
            if own or present.get(name, ABSENT) == noted.get(name, ABSENT):
                continue
            journal.keep(old.__dict__)
            if name in present:
                old.__dict__[name] = present[name]
            else:
                old.__dict__.pop(name, None)


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The configurations among items and inside each other, as the copy's id → (before, copy)."""
    for name in old.keys() & new.keys():
        if is_config(old[name]) and is_config(new[name]) and old[name] is not new[name]:
            yield id(new[name]), (old[name], new[name])
            yield from _pairs(vars(old[name]), vars(new[name]))


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration without those inside it, which have a pair of their own."""
    return {name: value for name, value in vars(config).items() if not is_config(value)}
