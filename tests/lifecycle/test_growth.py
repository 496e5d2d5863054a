"""The growth of the work of each verb with the model, counted in executed lines of Python, not in time."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import Combination, MergeError, PlanError, apply_rules, merge, unmerge
from surgery.patterns.paths import literal_alternatives
from surgery.rules import LoraRule
from surgery.rules._shared import combining, path_patterns
from surgery.state.records import site_state
from surgery.testing import Snapshot
from tests.benchmarks import verbs
from tests.support.line_counts import OURS, lines_of

Counts = dict[str, dict[int, int]]  # executed lines by verb and size


def count_work(make: Callable[[int], verbs.Layers], sizes: list[int], folder: Path) -> Counts:
    gc.collect()
    gc.freeze()  # the passes of `lines_of` need not visit the objects of other tests
    counts: Counts = {}
    classes: set[Any] = set()  # keeps classes alive: otherwise some calls would generate them again
    for size in sizes:
        model = make(size)
        for again in (False, True):  # the first call fills caches and is not counted
            for verb, work in verbs.steps(model, folder):
                lines = lines_of(work) if again else work() and 0
                classes |= {(type(module), getattr(site_state(module), "woven", None)) for module in model.modules()}
                if verb and again:
                    counts.setdefault(verb, {})[size] = lines
    return counts


@pytest.fixture(scope="module")
def by_layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counts]:
    torch.manual_seed(0)
    yield count_work(lambda layers: verbs.build_layers(layers, 2), [2, 4, 8], tmp_path_factory.mktemp("layers"))


def test_work_is_in_proportion_to_the_layers(by_layers: Counts) -> None:
    """A verb's work grows twice as much from 4 to 8 layers as from 2 to 4."""
    slopes = {verb: (at[8] - at[4]) / (2 * (at[4] - at[2])) for verb, at in by_layers.items()}
    assert min(slopes.values()) > 0.5, slopes
    assert not {verb: round(slope, 3) for verb, slope in slopes.items() if slope > 1.1}
    # Work for each pair of layers is a small share with few layers, and most of the work with hundreds.
    for_pairs = {verb: ((at[8] - at[4]) / 4 - (at[4] - at[2]) / 2) / 6 for verb, at in by_layers.items()}
    assert not {verb: round(lines, 2) for verb, lines in for_pairs.items() if lines > 1}


def test_idle_adapters_are_passed_over(tmp_path: Path) -> None:
    """One more adapter on 14 sites adds only a few lines for each site if a verb does not write all adapters."""
    counts = count_work(lambda adapters: verbs.build_layers(2, adapters), [3, 6], tmp_path)
    slopes = {verb: (at[6] - at[3]) / 3 for verb, at in counts.items() if verb not in verbs.WHOLE}
    assert not {verb: slope for verb, slope in slopes.items() if slope > 3 * 14}


# Work that a count of lines misses: the garbage collector, and single operations on whole containers ------------------


def test_the_collector_waits_during_verbs(tmp_path: Path) -> None:
    """A full pass of the collector visits all objects, so the number of passes must not grow with a verb's work."""
    model, passes = verbs.build_layers(4, 2), list[int]()
    passes_by_verb, threshold = dict[str, int](), gc.get_threshold()
    gc.collect()
    gc.freeze()  # the passes need not visit older objects

    def noted(phase: str, info: dict[str, int]) -> None:
        passes.append(info["generation"])

    try:
        for verb, work in verbs.steps(model, tmp_path):
            gc.collect()
            passes.clear()
            gc.callbacks.append(noted)
            gc.set_threshold(50)
            work()
            gc.callbacks.remove(noted)
            gc.set_threshold(*threshold)
            passes_by_verb[verb] = len(passes) // 2
    finally:
        gc.callbacks[:] = [callback for callback in gc.callbacks if callback is not noted]
        gc.set_threshold(*threshold)
    left = {"", "explain", "summary", "adapters", "adapter_state_dict", "base_state_dict", *TORCHS}
    assert gc.isenabled() and passes_by_verb["unpickle"] > 4  # passes during torch's own work are counted
    assert not {verb: count for verb, count in passes_by_verb.items() if verb not in left and count > 4}


TORCHS = ("torch: state_dict", "deepcopy", "pickle", "unpickle")


class Counting(dict):
    """A mapping that counts how often a caller reads all of it."""

    reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return super().__iter__()

    def values(self) -> Any:
        self.reads += 1
        return super().values()


def test_patterns_are_read_once_for_all_sites() -> None:
    patterns = Counting({rf"layers\.{index}\.q": index for index in range(20)})
    assert [path_patterns.first(patterns, f"layers.{index}.q", None) for index in range(20)] == list(range(20))
    assert patterns.reads == 1
    patterns["v"] = 3  # a larger mapping is read again
    assert path_patterns.first(patterns, "layers.0.v", None) == 3 and patterns.reads == 2


def test_all_rules_are_read_once_for_all_sites_of_a_combination() -> None:
    patterns = Counting({"q": 4})

    class One(tuple[Any, ...]):
        rank, max_rank, rank_pattern, bias = 2, None, patterns, "none"

    how = Combination("linear", {"a": 1.0}, rules=(One(), One()))  # type: ignore[arg-type]
    assert [combining.largest_rank(how) for _ in range(5)] == [4] * 5 and patterns.reads == 2
    assert combining.all_agree(how, "bias")


@pytest.mark.parametrize(
    ("expression", "texts"),
    [
        (r"a\.b|c\-d|e_1", {"a.b", "c-d", "e_1"}),
        ("a", {"a"}),
        ("a.b", None),
        (r"\d|a", None),
        (r"a\|b", None),
        ("(a)", None),
    ],
)
def test_expressions_that_list_paths_are_looked_up(expression: str, texts: set[str] | None) -> None:
    assert literal_alternatives(expression) == texts
    for text in texts or ():
        assert re.fullmatch(expression, text)


def test_patterns_of_whole_paths_are_looked_up() -> None:
    keys = (r"^(?:a\.b|c)", "b", r"x.*\.c", r"^(?:a.b)")
    for path in ("a.b", "x.a.b", "c", "x.c", "a_b", "q"):
        expected = next((key for key in keys if path_patterns.fits(key, path)), None)
        assert path_patterns.first(dict(zip(keys, keys, strict=True)), path, None) == expected
    assert path_patterns.unused(keys, ["a.b"]) == [r"x.*\.c"] and path_patterns.unused(keys, ["b"]) == [
        keys[0],
        *keys[2:],
    ]


def test_no_container_is_made_anew_for_each_element() -> None:
    """`x in set(names)` as the condition of a comprehension goes through all names for each x."""
    places = []
    for path in (file for folder in OURS for file in Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for test in (test for part in getattr(node, "generators", ()) for test in part.ifs):
                compared = [expression for expression in ast.walk(test) if isinstance(expression, ast.Compare)]
                sought = (
                    value
                    for expression in compared
                    if isinstance(expression.ops[0], IN)
                    for value in expression.comparators
                )
                calls = [value.func for value in sought if isinstance(value, ast.Call)]
                if any(isinstance(function, ast.Name) and function.id in CONTAINERS for function in calls):
                    places.append(f"{path.name}:{test.lineno}")
    assert not places


IN = (ast.In, ast.NotIn)
CONTAINERS = {"set", "frozenset", "list", "tuple", "dict", "sorted"}


# The map of a model's parameters to their owners ---------------------------------------------------------------


class Tied(nn.Module):
    """Three Linears with one weight; one Linear has two names."""

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
