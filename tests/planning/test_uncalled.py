"""Modules that no code calls, since their owner reads their weight on every branch: adapters have no effect there."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery import PlanError, SurgeryError, SurgeryWarning, apply_rules, merge, plan_rules, remove, unmerge
from surgery.planning.uncalled_modules import never_called
from surgery.rules import IA3Rule, LoraRule, TrainRule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES
from tests.support.family_runs import run, tensors


class Owner(nn.Module):
    config: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.config = type("Config", (), settings)()
        self.flag = True


class BothBranches(Owner):
    def forward(self, x: Tensor, cached: bool = False) -> Tensor:
        return F.linear(x, self.inner.weight) if cached else self.helper(x, self.inner.weight.t())

    def helper(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class Kernels(Owner):
    """Like Mamba's convolution: each branch passes the weight to another function."""

    def forward(self, x: Tensor, cached: bool = False) -> Tensor:
        if cached:
            x = first(x, self.inner.weight.squeeze(1))
        else:
            x = second(x, self.inner.weight.squeeze(1), self.inner.bias)
        return x


def first(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def second(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


class ReadUnderASetting(Owner):
    """No setting leads to a call of the module."""

    def forward(self, x: Tensor) -> Tensor:
        y = None
        if not getattr(self.config, "two_stage", False):
            y = self.inner.weight
        return x if y is None else x @ y


class CalledUnderASetting(Owner):
    """Like FalconMamba's dt_proj, which is called if the model is quantised."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.config, "quantised") or (self.flag is None and self.config.depth > 2):
            y = self.inner(x)
        else:
            y = self.inner.weight @ x
        return y


class CalledOnOneBranch(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.requires_grad else F.linear(x, self.inner.weight)


class CalledByAMethod(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight) if self.training else self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        layer = self.inner
        return layer(x)


class CalledForOthers(Owner):
    """A method that the owner's forward does not use."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight) if self.training else x

    def features(self, x: Tensor) -> Tensor:
        return self.inner(x)


class CalledByAName(Owner):
    def forward(self, x: Tensor, name: str = "inner") -> Tensor:
        return F.linear(x, self.inner.weight) if self.training else getattr(self, name)(x)


class HandedOn(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight) if self.training else checkpoint(self.inner, x, use_reentrant=False)


class CalledFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.owner = ReadUnderASetting()

    def forward(self, x: Tensor) -> Tensor:
        return self.owner(x) + self.owner.inner(x)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, self.layers[0].weight)  # type: ignore[arg-type]
        for layer in self.layers:
            x = layer(x)
        return x


REFUSED = [
    BothBranches(),
    Kernels(),
    ReadUnderASetting(),
    ReadUnderASetting(two_stage=True),
    CalledUnderASetting(depth=1),
]
CALLED: list[tuple[nn.Module, str]] = [
    (CalledUnderASetting(quantised=True), "inner"),
    (CalledOnOneBranch(), "inner"),
    (CalledByAMethod(), "inner"),
    (CalledForOthers(), "inner"),
    (CalledByAName(), "inner"),
    (HandedOn(), "inner"),
    (CalledFromAbove(), "owner.inner"),
    (Looped(), "layers.0"),
]


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else ""


@pytest.mark.parametrize("model", REFUSED, ids=named)
@pytest.mark.parametrize(
    "target_rule", [LoraRule("inner"), IA3Rule("inner"), TrainRule("inner")], ids=lambda target_rule: target_rule.label
)
def test_a_module_that_is_only_read_is_refused(model: nn.Module, target_rule: Any) -> None:
    before = Snapshot(model)
    assert never_called(model, ["inner"])
    with pytest.raises(PlanError, match="would be bypassed") as caught:
        apply_rules(model, [target_rule])
    message = str(caught.value)
    assert "test_uncalled.py:" in message and "inner.weight" in message
    if not isinstance(model, BothBranches):  # there, each branch reads the weight
        assert "no code calls the module" in message
    assert before.differences(model) == []
    assert not plan_rules(model, [LoraRule("other")]).problems


@pytest.mark.parametrize("model, path", CALLED, ids=named)
def test_a_module_that_some_code_calls_is_warned_of(model: nn.Module, path: str) -> None:
    assert not never_called(model, [path])
    plan = plan_rules(model, [LoraRule("re:" + re.escape(path))])
    assert not plan.problems
    assert any("is bypassed on one branch" in warning for warning in plan.warnings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "jamba", "zamba2", "bamba"])
def test_the_convolution_of_state_space_models(family: str) -> None:
    """Every branch passes the weight to a kernel. PEFT refuses the module by name for some of these models."""
    model = FAMILIES[family].make()
    (problem,) = {problem.what for problem in plan_rules(model, [LoraRule("conv1d", rank=2)]).problems}
    assert problem == "LoraRule would be bypassed"


@pytest.mark.filterwarnings("ignore")
def test_a_rule_that_comes_with_another_leaves_it_out() -> None:
    """bias="all": if code reads a bias directly, a copy of the bias has no effect."""
    model = FAMILIES["mamba2"].make()
    plan = plan_rules(model, [LoraRule("in_proj", rank=2, bias="all")])
    assert not plan.problems
    (message,) = [warning for warning in plan.warnings if "leaves out" in warning]
    assert message.startswith("BiasRule leaves out backbone.layers.0.mixer.conv1d and modules like it")
    assert {step.path.rpartition(".")[2] for step in plan.steps if step.rule.label == "BiasRule"} == {"mixer"}


EVERY = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else ["bert", "falcon_mamba", "deformable_detr", "led"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", EVERY)
def test_what_a_call_does_not_reach_is_live_as_it_is_merged_or_refused(family: str) -> None:
    """Without an example: each kind of module with weights whose forward no call runs."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[family].make().eval(), FAMILIES[family].inputs()
    called: set[int] = set()
    hooks = [
        part.register_forward_pre_hook(lambda part, args: called.add(id(part)))  # type: ignore[func-returns-value]
        for part in model.modules()
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    seen: set[str] = set()
    for path, part in list(model.named_modules()):
        kind = re.sub(r"\d+", "#", path)
        if id(part) in called or kind in seen or not isinstance(part, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            continue
        seen.add(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)
            try:
                apply_rules(model, [LoraRule("re:" + re.escape(path), rank=2, init="random")])
            except PlanError:
                continue
        live = run(model, inputs)
        try:
            merge(model, untie=True)
        except SurgeryError:
            pass
        else:
            for output, expected in zip(run(model, inputs), live, strict=True):
                assert (output - expected).abs().max() <= 1e-3 * (1e-3 + expected.abs().max()), path
            unmerge(model)
        remove(model)
    assert list(tensors(model(**inputs)))


def test_the_output_map_of_an_attention_is_trained_with_it() -> None:
    """bias="all": nn.MultiheadAttention reads out_proj's parameters in its own forward."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    plan = plan_rules(model, [LoraRule("up", rank=2, bias="all")])
    assert not plan.problems and not plan.warnings
    (step,) = [step for step in plan.steps if step.path == "attention"]
    assert {spec.name for spec in step.specs} == {"in_proj_bias", "out_proj_bias"}


@pytest.mark.parametrize("held", [nn.ParameterDict({"w": torch.ones(4, 4)}), nn.ParameterList([torch.ones(4, 4)])])
def test_a_container_of_parameters_is_refused(held: nn.Module) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.held = nn.Linear(4, 4), held

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ next(self.held.parameters())

    model = Holding()
    before = Snapshot(model)
    with pytest.raises(PlanError, match="(?s)never called.*no rule reaches parameters that a container hands out"):
        apply_rules(model, [TrainRule("held")])
    assert not before.differences(model)
