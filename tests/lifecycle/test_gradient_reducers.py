"""The search for DistributedDataParallel: objects that `gc.freeze` hides, and one search in a backward pass."""

from __future__ import annotations

import gc
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules
from surgery.lifecycle import gradient_reducers
from surgery.rules import LoraRule


class Wrapper:
    """An object to be found."""


def wrappers() -> set[int]:
    return {id(found) for found in gradient_reducers._objects() if type(found) is Wrapper}


@pytest.fixture
def frozen() -> Iterator[None]:
    """Takes back what a test froze. The tests' own configuration may have frozen what it imported."""
    before = gc.get_freeze_count()
    yield
    gc.unfreeze()
    if before:
        gc.freeze()


def generator(held: Wrapper) -> Iterator[Any]:
    yield
    yield held


PLACES: dict[str, Any] = {
    "a list": lambda new: [new],
    "an attribute": lambda new: types.SimpleNamespace(inner=types.SimpleNamespace(model=new)),
    "a closure": lambda new: lambda: new,
    "a bound method": lambda new: new.__init__,
    "a suspended generator": lambda new: (made := generator(new), next(made))[0],
    "a class": lambda new: type("Holder", (), {"held": new}),
    "a module": lambda new: nn.ModuleDict({"a": nn.Linear(1, 1)}).__setattr__("held", new) or new,
}


def test_frozen_objects_are_found(frozen: None) -> None:
    """All places in one search: it goes through all objects of the process."""
    numbers, holders = {}, []
    for place, put in PLACES.items():
        new = Wrapper()
        numbers[place] = id(new)
        holders.append(put(new))
        del new
    seen = wrappers()
    assert not {place for place, number in numbers.items() if number not in seen}
    gc.freeze()
    assert not any(type(found) is Wrapper for found in gc.get_objects())
    seen = wrappers()
    assert not {place for place, number in numbers.items() if number not in seen} and len(holders) == len(PLACES)


def test_frozen_variables_of_running_functions_are_found(frozen: None) -> None:
    """Of this thread and of another one."""
    ready, done, numbers = threading.Event(), threading.Event(), []

    def other() -> None:
        variable = Wrapper()
        numbers.append(id(variable))
        ready.set()
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    variable = Wrapper()
    gc.freeze()
    try:
        assert {id(variable), *numbers} <= wrappers()
    finally:
        done.set()
        thread.join()


def test_the_search_leaves_what_is_frozen(frozen: None) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    after = [object() for _ in range(3)], Wrapper()
    assert id(after[1]) in wrappers()
    assert gc.get_freeze_count() > before // 2  # some frozen objects may have died; unfreezing leaves none


def test_one_search_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no DDP wraps a model, each of its parameters asks."""
    searches = []
    monkeypatch.setattr(gradient_reducers, "_several_processes", lambda: True)
    monkeypatch.setattr(gradient_reducers, "_wrappers", lambda: searches.append(1) or [])
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    apply_rules(model, LoraRule(nn.Linear, rank=2, init="random"))
    for count in (1, 1):
        model(torch.randn(2, 4)).sum().backward()
        assert len(searches) == count
