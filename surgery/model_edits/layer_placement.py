"""Searches fields that say which layers are of another kind: the first k, every n-th, lists of indices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from surgery.model_edits.config_fields import Place, fields_of, index_lists
from surgery.model_edits.layer_config import LayerConfig
from surgery.model_edits.model_differences import differences

__all__ = ["place_kinds"]

_PERIODS = ("step", "period", "interval", "freq", "every", "pattern")
_BOUNDS = ("start", "end", "offset", "index", "first", "last")

Change = tuple[Place, Any]


def place_kinds(found: LayerConfig, attempt: Callable[..., Any], order: Sequence[int], count: int) -> LayerConfig:
    """Return a configuration that builds more layers as they are now, if changes of such fields lead to one."""
    for _ in range(3):
        if found.score[1:] == (0, 0):
            return found
        changes = {(change[0], repr(change[1])): change for change in _changes(found, order, count)}
        candidates = [_try(found, attempt, [change]) for change in changes.values()]
        best = min((c for c in candidates if c is not None), key=lambda c: c.score, default=found)
        if best.score >= found.score:
            best = _pairs(found, attempt, order, count) or found
        if best.score >= found.score:
            return found
        found = best
    return found


def _pairs(found: LayerConfig, attempt: Callable[..., Any], order: Sequence[int], count: int) -> LayerConfig | None:
    """Every layer of one kind by its period, and the exceptions by a list of indices."""
    candidates = []
    for place, value in fields_of(found.config):
        if type(value) is int and any(word in place.name for word in _PERIODS):
            every = _try(found, attempt, [(place, 1)])
            if every is not None:
                lists = index_lists(every.config, count)
                candidates += [_try(every, attempt, [(at, _mismatched(every, order))]) for at in lists]
    return min((c for c in candidates if c is not None), key=lambda c: c.score, default=None)


def _changes(found: LayerConfig, order: Sequence[int], count: int) -> Iterator[Change]:
    """Single changes of fields that may say which layers are of another kind."""
    for place in index_lists(found.config, count):
        listed = place.read(found.config)
        moved = [position for position, index in enumerate(order) if index in listed]
        yield place, type(listed)(moved)
        yield place, type(listed)(sorted({*moved} ^ {*_mismatched(found, order)}))
    for place, value in fields_of(found.config):
        if type(value) is not int or not -1 <= value <= count:
            continue
        for new in (sum(index < value for index in order), sum(index <= value for index in order) - 1):
            yield place, new
        if any(word in place.name for word in _PERIODS):
            yield from ((place, new) for new in (1, 2, 3, 4))
        if any(word in place.name for word in _BOUNDS):
            yield from ((place, new) for new in range(-1, min(len(order), 8) + 1))


def _mismatched(found: LayerConfig, order: Sequence[int]) -> list[int]:
    """The positions at which the built model has a layer of another kind."""
    positions = set[int]()
    for path in found.lists:
        old, new = (list(model.get_submodule(path).children()) for model in (found.before, found.after))
        for position, index in enumerate(order):
            if any(difference.has_tensors for difference in differences(old[index], new[position])):
                positions.add(position)
    return sorted(positions)


def _try(found: LayerConfig, attempt: Callable[..., Any], changes: Sequence[Change]) -> LayerConfig | None:
    config = copy.deepcopy(found.config)
    if all(place.read(config) == value for place, value in changes):
        return None
    for place, value in changes:
        place.write(config, copy.copy(value))
    result = attempt(config, ())
    if not isinstance(result, LayerConfig):
        return None
    names = (*found.fields, *(str(place) for place, _ in changes))
    return replace(result, fields=tuple(dict.fromkeys(names)))
