"""Many adapters and sites: adapters are independent, and sites that share a recording behave as if alone."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Pattern,
    PlanError,
    Rule,
    SiteError,
    activate,
    active,
    apply_rules,
    base_state_dict,
    deactivate,
    merge,
    remove,
    rule,
    unmerge,
)
from surgery.planning.matching import Tree, matches
from surgery.rules import LoraRule, TrainRule
from surgery.rules._linear.initial import _kaiming
from surgery.rules._shared import path_patterns
from surgery.testing import Snapshot
from tests.support import tiny

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def layers(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))


# Sites that are alike -----------------------------------------------------------------------------------------

consulted_paths: list[str] = []


@rule("test-alike")
class AlikeRule(Rule):
    """y + scale, with a chosen result of `alike`, and a list of the sites where it was recorded."""

    scale: float = 1.0
    answer: Any = "said"
    finds: bool = False

    def alike(self, path: str) -> Any:
        if self.answer == "raises":
            raise KeyError("no such path")
        return {"path": path, "none": None, "mutable": []}.get(self.answer, self.answer)

    def check(self, module: nn.Module, path: str) -> str | None:
        return "it is too wide" if getattr(module, "out_features", 0) > 100 else None

    def rewrite(self, site: Any) -> Tensor:
        consulted_paths.append(site.path)
        gain = site.fact("found", lambda: 2.0) if self.finds else 1.0
        return site.output + site.param("shift", (site.out_features,), self.scale) * gain


@rule("test-alike-heir")
class AlikeHeir(AlikeRule):
    def rewrite(self, site: Any) -> Tensor:
        consulted_paths.append(site.path)
        return site.output * float(site.module.weight.detach()[0, 0])


@pytest.fixture(autouse=True)
def _clear_consulted_paths() -> None:
    consulted_paths.clear()


@pytest.mark.parametrize(
    ("made", "recorded"),
    [
        (AlikeRule(nn.Linear), ["0"]),
        (AlikeRule(nn.Linear, answer="path"), ["0", "1", "2", "3"]),
        (AlikeRule(nn.Linear, answer="none"), ["0", "1", "2", "3"]),
        (AlikeRule(nn.Linear, finds=True), ["0", "1", "2", "3"]),  # each site has its own facts
        (AlikeHeir(nn.Linear), ["0", "1", "2", "3"]),
    ],
)
def test_one_is_asked_for_all_that_are_alike(made: Rule, recorded: list[str]) -> None:
    model = layers()
    weights = base_state_dict(model)
    apply_rules(model, made)
    assert consulted_paths == recorded
    x = X
    for index in range(4):
        x = nn.functional.linear(x, weights[f"{index}.weight"], weights[f"{index}.bias"])
        heir = isinstance(made, AlikeHeir)
        x = x * float(weights[f"{index}.weight"][0, 0]) if heir else x + (2.0 if made.finds else 1.0)  # type: ignore[attr-defined]
    torch.testing.assert_close(model(X), x)


class Wide(nn.Linear):
    pass


class Odd(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.settings = {"a": 1}  # not plain data, so the module has no key


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (lambda: nn.Linear(8, 8), True),
        (lambda: nn.Linear(8, 8).requires_grad_(False), True),
        (lambda: nn.Linear(8, 6), False),
        (lambda: nn.Linear(8, 8, bias=False), False),
        (lambda: nn.Linear(8, 8).double(), False),
        (lambda: nn.Linear(8, 8).eval(), False),
        (lambda: Wide(8, 8), False),
        (lambda: Odd(8, 8), False),
    ],
)
def test_what_is_alike(other: Callable[[], nn.Module], same: bool) -> None:
    apply_rules(nn.ModuleList([nn.Linear(8, 8), other(), other()]), AlikeRule(nn.Linear))
    assert consulted_paths == (["0"] if same else ["0", "1", "2"] if other().__dict__.get("settings") else ["0", "1"])


def test_modules_with_children_are_asked_one_by_one() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 24)])
    lora_rule = LoraRule(nn.MultiheadAttention, rank=2)
    apply_rules(model, [lora_rule, AlikeRule("linear2")])
    assert consulted_paths == ["0.linear2", "1.linear2"]
    apply_rules(nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(12, 2)]), lora_rule)


@pytest.mark.parametrize("answer", ["raises", "mutable"])
def test_an_answer_that_is_none_is_told(answer: str) -> None:
    model = layers()
    before = Snapshot(model)
    with pytest.raises(PlanError, match="AlikeRule.alike fails") as error_info:
        apply_rules(model, AlikeRule(nn.Linear, answer=answer))
    assert [problem.where for problem in error_info.value.problems] == ["0", "1", "2", "3"]  # type: ignore[attr-defined]
    assert not before.differences(model)


def test_what_one_is_refused_for_is_told_of_each() -> None:
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 200), nn.Linear(200, 200), nn.Linear(200, 8))
    with pytest.raises(PlanError) as error_info:
        apply_rules(model, AlikeRule(nn.Linear))
    problems = error_info.value.problems
    assert all(isinstance(problem, SiteError) and problem.why == "it is too wide" for problem in problems)
    assert [problem.where for problem in problems] == ["0", "1", "2"]


def test_ranks_differ_where_modules_are_alike() -> None:
    model = layers()
    lora_rule = LoraRule(
        nn.Linear, rank=2, alpha=4, rank_pattern={"1": 3, "[23]": 5}, alpha_pattern={"3": 1}, init="random"
    )
    apply_rules(model, lora_rule)
    boxes: list[Any] = [layer.adapters.default for layer in model]  # type: ignore[union-attr]
    assert [box.A.shape[0] for box in boxes] == [2, 3, 5, 5]
    x = X
    for layer, box, scale in zip(model, boxes, (2.0, 4 / 3, 0.8, 0.2), strict=True):
        x = nn.functional.linear(x, layer.weight + scale * box.B @ box.A, layer.bias)  # type: ignore[operator, arg-type]
    torch.testing.assert_close(model(X), x)


@pytest.mark.parametrize("shape", [(4, 6), (8, 3, 5), (2, 16, 3, 3), (1, 1), (3, 0)])
def test_lora_starts_as_torch_does(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    mine = _kaiming(torch.empty(shape))
    torch.manual_seed(3)
    theirs = torch.empty(shape)
    if theirs.numel():
        nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert torch.equal(mine, theirs)


# Many targets and patterns ------------------------------------------------------------------------------------

_PARTS = ["a", "b", "ab", "0", "10", "q-proj", "a_b", "axb"]


def _path(draw: random.Random) -> str:
    return ".".join(draw.choice(_PARTS) for _ in range(draw.randint(1, 4)))


def _key(draw: random.Random) -> str:
    path = _path(draw)
    forms = (
        path, re.escape(path), path.replace(".", r"\.", 1), f"{path}|{_path(draw)}", path.replace("a", "[ab]"),
        f"{path}.*", path.replace(".", "x"), f"({path})?", "",
    )  # fmt: skip
    return draw.choice(forms)


def test_patterns_of_ranks_are_what_peft_reads() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        patterns = {_key(draw): index for index in range(draw.randint(0, 6))}
        paths = [_path(draw) for _ in range(3)]

        def fitting(path: str, patterns: dict[str, int] = patterns) -> list[str]:
            return [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]  # PEFT's get_pattern_key

        for path in paths:
            assert path_patterns.first(patterns, path, None) == next((patterns[key] for key in fitting(path)), None), (
                patterns,
                path,
            )
        assert path_patterns.unused(patterns, paths) == [
            key for key in patterns if not any(key in fitting(path) for path in paths)
        ]


def test_names_by_the_hundred_mean_what_each_means() -> None:
    draw = random.Random(1)
    model = nn.Module()
    for _ in range(60):
        at = model
        for part in _path(draw).split("."):
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
    tree = Tree.of(model)
    for _ in range(300):
        targets, exclude = ([_path(draw) for _ in range(draw.randint(1, 5))] for _ in range(2))
        patterns = [(Pattern.name(text), Pattern.name(out)) for text, out in zip(targets, exclude * 5, strict=False)]
        wanted = [
            path
            for path, module in model.named_modules()
            if any(target.match(path, module) for target, _ in patterns)
            and not any(Pattern.name(text).match(path, module) for text in exclude)
        ]
        no_matches = matches(tree, LoraRule(targets, exclude=exclude, expect=0)) if not wanted else None
        assert no_matches == [] or [m.path for m in matches(tree, LoraRule(targets, exclude=exclude))] == wanted


# Many adapters ------------------------------------------------------------------------------------------------


def test_a_hundred_live_adapters_add_up() -> None:
    model = layers(1)
    for index in range(100):
        apply_rules(model, LoraRule("0", rank=1, alpha=1, init="random"), adapter=f"a{index}")
    layer: Any = model[0]
    expected = nn.functional.linear(X, layer.weight, layer.bias)
    for box in layer.adapters.children():
        expected = expected + X @ box.A.t() @ box.B.t()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
    model(X).sum().backward()
    assert all(box.B.grad is not None for box in layer.adapters.children())
    remove(model)
    assert type(model[0]) is nn.Linear and torch.equal(model(X), nn.functional.linear(X, layer.weight, layer.bias))


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    marked = {key: value for key, value in model.state_dict().items() if f".adapters.{name}." in key}
    return {key: value.clone() for key, value in marked.items()}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_came_and_went_the_live_ones_count(seed: int) -> None:
    """Compares to the bit with a model that only ever had the live adapters."""
    draw, model = random.Random(seed), layers()
    kinds: dict[str, Rule] = {
        "wide": LoraRule(nn.Linear, rank=2, init="random"),
        "part": LoraRule(["1", "3"], rank=3, alpha=1, init="random"),
        "train": TrainRule("2"),
        "one": LoraRule("0", rank=1, dropout=0.5, init="random"),
    }
    applied_rules: dict[str, Rule] = {}
    for step in range(40):
        action = draw.choice(["add", "add", "remove", "activate", "deactivate", "copy", "merge"])
        name = f"a{draw.randint(0, 5)}"
        kind = kinds[draw.choice([key for key in kinds if key != "train" or kinds[key] not in applied_rules.values()])]
        if action == "add" and name not in applied_rules:
            applied_rules[name] = kind
            apply_rules(model, applied_rules[name], adapter=name)
        elif action == "remove" and applied_rules:
            gone = draw.sample(list(applied_rules), draw.randint(1, min(2, len(applied_rules))))
            remove(model, gone)
            applied_rules = {name: applied_rule for name, applied_rule in applied_rules.items() if name not in gone}
        elif action == "activate" and applied_rules:
            activate(model, draw.sample(list(applied_rules), draw.randint(1, len(applied_rules))))
        elif action == "deactivate" and applied_rules:
            deactivate(model)
        elif action == "copy":
            model = draw.choice([copy.deepcopy, lambda copied_model: pickle.loads(pickle.dumps(copied_model))])(model)
        elif (
            action == "merge"
            and applied_rules
            and active(model)
            and not any(isinstance(applied_rules[live_name], TrainRule) for live_name in active(model))
        ):
            merge(model)
            unmerge(model)
        live = active(model) if applied_rules else ()
        other = layers()
        for name in live:
            apply_rules(other, applied_rules[name], adapter=name)
            other.load_state_dict(_tensors(model, name), strict=False)
        assert torch.equal(model.eval()(X), other.eval()(X)), (step, action, live)
        if live:
            assert [type(a).forward.__code__.co_code for a in model] == [
                type(b).forward.__code__.co_code for b in other
            ]


def test_a_name_that_is_used_again_means_the_new_adapter() -> None:
    model = layers(1)
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="b")
    activate(model, "b")
    activate(model, "a")
    remove(model, "b")  # b is idle
    apply_rules(model, AlikeRule("0", scale=3.0), adapter="b")
    activate(model, "b")
    layer: Any = model[0]
    assert torch.equal(model(X), nn.functional.linear(X, layer.weight, layer.bias) + 3.0)


class _Fails(Exception):
    pass


@rule("test-fails-late")
class FailsLate(AlikeRule):
    def initialise(self, site: Any) -> None:
        if site.path == "2":
            raise _Fails


def test_what_failed_leaves_no_trace_for_the_next() -> None:
    model = layers()
    apply_rules(model, LoraRule(nn.Linear, rank=2, init="random"), adapter="a")
    before, output = Snapshot(model), model(X)
    with pytest.raises(SiteError, match="FailsLate.initialise fails"):
        apply_rules(model, FailsLate(nn.Linear), adapter="b")
    assert not before.differences(model)
    apply_rules(model, LoraRule(nn.Linear, rank=2), adapter="b")
    assert torch.equal(model(X), output)
    remove(model, "b")
    assert not before.differences(model)


def test_adapters_can_be_named_twice_to_go() -> None:
    model = apply_rules(layers(), LoraRule(nn.Linear, rank=2), adapter="a")
    apply_rules(model, LoraRule(nn.Linear, rank=2), adapter="b")
    assert active(remove(model, ["a", "a"])) == ("b",)


def test_what_is_left_out_of_a_save_follows_every_change() -> None:
    model: Any = tiny.bert()[0]
    model.bert.encoder.layer[1].attention.self.query = model.bert.encoder.layer[
        0
    ].attention.self.query  # a shared module with two paths
    original = {module: module._keys_to_ignore_on_save for module in (model, model.bert)}

    def check() -> None:
        for saver in original:
            keys = {key for key, _ in saver.named_parameters(remove_duplicate=False) if ".adapters." in key}
            assert {key for key in saver._keys_to_ignore_on_save if ".adapters." in key} == keys

    for name in ("a", "b", "c"):
        apply_rules(model, LoraRule(["query", "value"] if name != "b" else "dense", rank=2), adapter=name)
        check()
    remove(model, "b")
    check()
    with pytest.raises(SiteError):
        apply_rules(model, FailsAlways(["query"]), adapter="d")
    check()
    remove(model, ["c", "a"])
    assert {module: module._keys_to_ignore_on_save for module in original} == original


@rule("test-fails-always")
class FailsAlways(AlikeRule):
    def initialise(self, site: Any) -> None:
        raise _Fails
