"""Interrupts verbs by an exception at the n-th step of the engine's code, and compares the model with before.

A step is a call of a function of the engine or a rule, or (`lines`) a line of one. sys.settrace raises there, as a key
pressed at that moment would.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery import rules
from surgery.state.records import _MODEL, _SITE, ModelState, SiteState
from surgery.testing import Snapshot

ROOTS = tuple(str(Path(package.__file__ or "").parent) for package in (surgery, rules))
# Code that undoes changes is excluded: an error there can't be undone.
LEFT_OUT = tuple(f"{ROOTS[0]}/{name}.py" for name in ("transaction/undo_log", "transaction/neutral_context", "testing"))
assert all(map(os.path.isfile, LEFT_OUT)), LEFT_OUT


_GUARD = re.compile(r"with (_lock|torch\.no_grad)")


class Broken(Exception):
    """An error that nobody expects."""


@contextmanager
def broken(step: int, error: type[BaseException] = Broken, lines: bool = False) -> Iterator[list[int]]:
    """Raise at this step of the engine's code; yield a list with the number of steps.

    Lines that take a lock or switch gradients off are skipped: Python reports them again when the block ends, where no
    interrupt comes, and a lock that is not released, or a mode that stays, would spoil another test.
    """
    count = [0]
    wanted = "line" if lines else "call"

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(ROOTS) or name.startswith(LEFT_OUT):
            return None
        if event == wanted and not (lines and _GUARD.search(linecache.getline(name, frame.f_lineno))):
            count[0] += 1
            if count[0] == step:
                sys.settrace(None)
                raise error(f"at {name}:{frame.f_lineno}")
        return trace if lines else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


class Everything(Snapshot):
    """A snapshot that also has the engine's records, the order of hooks, gradients and a transformers config."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.facts |= _records(model)

    def differences(self, model: nn.Module) -> list[str]:
        now = _records(model)
        differences = [
            f"{key} is {now.get(key)}, was {was}" for key, was in self.facts.items() if now.get(key, was) != was
        ]
        facts, self.facts = self.facts, {key: fact for key, fact in self.facts.items() if key not in now}
        try:
            differences += super().differences(model)
        finally:
            self.facts = facts
        differences += [f"{key} is new" for key in now if key not in self.facts]
        return differences


def _records(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        facts["config"] = str(config.to_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.__dict__.items():
            if name == _MODEL:
                facts["record of the model"] = _model_record(value)
            elif name == _SITE:
                facts[f"record of {path!r}"] = _site_record(value)
            elif isinstance(value, (bool, int, float, str, type(None), set, frozenset)):
                facts[f"attribute {name} of {path!r}"] = set(value) if isinstance(value, (set, frozenset)) else value
    return facts


def _model_record(state: ModelState) -> tuple:
    return (
        {name: tuple(map(id, rules)) for name, rules in state.adapters.items()},
        list(state.adapters),
        dict(state.flags),
        [(path, str(value)) for path, value in state.ignored_on_save],
        list(state.switched),
        {name: (list(map(id, p.modules)), list(map(id, p.boxes))) for name, p in state.places.items()},
        {name: (id(status), status.live, status.weight, status.in_base) for name, status in state.standing.items()},
        dict(state.resting),
    )


def _site_record(site: SiteState) -> tuple:
    merged = site.merged
    return (
        site.path,
        site.base,
        [(id(a), a.adapter, id(a.rule), len(a.changed), a.tensors, a.trained, str(a.facts)) for a in site.applied],
        None if merged is None else (merged.adapters, [name for name, _ in merged.folds], list(merged.tied)),
    )


def steps_of(work: Callable[[], Any], lines: bool = False) -> int:
    """Count the steps of a function."""
    with broken(-1, lines=lines) as count:
        work()
    return count[0]


def random_state() -> Any:
    return torch.get_rng_state()
