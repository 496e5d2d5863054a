"""How the work of each verb grows: lines of Python that run are counted, and never time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rules import LoraRule
from surgery import MergeError, PlanError, apply_rules, merge, unmerge
from surgery.state import site_state
from surgery.testing import Snapshot
from tests.benchmarks import verbs

Counts = dict[str, dict[int, int]]  # lines run, by verb and size


def lines_of(work: Callable[[], Any]) -> int:
    """How many lines of Python run in a call, those of torch's own included."""
    count = 0

    def inside(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return inside

    before = sys.gettrace()
    gc.disable()  # what it would call belongs to no verb
    sys.settrace(lambda *_: inside)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def counted(make: Callable[[int], verbs.Layers], sizes: list[int], folder: Path) -> Counts:
    found: Counts = {}
    kept: set[Any] = set()  # classes go with the last module that has them, and would be made anew now and then
    for size in sizes:
        model = make(size)
        for again in (False, True):  # what a first call makes once for all is not counted
            for verb, work in verbs.steps(model, folder):
                lines = lines_of(work) if again else work() and 0
                kept |= {(type(module), getattr(site_state(module), "woven", None)) for module in model.modules()}
                if verb and again:
                    found.setdefault(verb, {})[size] = lines
    return found


@pytest.fixture(scope="module")
def by_layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counts]:
    torch.manual_seed(0)
    yield counted(lambda layers: verbs.made(layers, 2), [2, 4, 8], tmp_path_factory.mktemp("layers"))


def test_work_is_in_proportion_to_the_layers(by_layers: Counts) -> None:
    """From 4 to 8 layers a verb's work grows by twice as much as from 2 to 4."""
    slopes = {verb: (at[8] - at[4]) / (2 * (at[4] - at[2])) for verb, at in by_layers.items()}
    assert min(slopes.values()) > 0.9, slopes
    assert not {verb: round(slope, 3) for verb, slope in slopes.items() if "one a layer" not in verb and slope > 1.02}


# What one map of a model's parameters has to know ---------------------------------------------------------------


class Tied(nn.Module):
    """Three Linears on one weight, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.b.weight = self.c.weight = self.a.weight
        self.again = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def test_a_shared_weight_is_told_by_all_its_names() -> None:
    model = apply_rules(Tied(), LoraRule(["a", "b"], rank=2, init="random"))
    before = Snapshot(model)
    with pytest.raises((PlanError, MergeError), match=r"one parameter serves a\.weight and b\.weight and c\.weight"):
        merge(model)
    assert not before.differences(model)


def test_the_last_holder_of_an_untied_weight_keeps_it() -> None:
    model = apply_rules(Tied(), LoraRule(["a", "b", "c"], rank=2, init="random"))
    shared, x = model.a.weight, torch.randn(3, 8)
    bits, before = shared.clone(), model(x)
    merge(model, untie=True)
    assert model.c.weight is shared and model.a.weight is not shared is not model.b.weight
    torch.testing.assert_close(model(x), before)
    unmerge(model)
    assert model.a.weight is model.b.weight is model.c.weight is shared and torch.equal(shared, bits)
    assert torch.equal(model(x), before)


def test_a_start_in_a_shared_weight_is_refused() -> None:
    model = Tied()
    with pytest.raises((PlanError, MergeError), match="one parameter serves"):
        apply_rules(model, LoraRule(["a"], rank=2, init="pissa"))
