"""`remove` and `unmerge` restore the bits of random models with random rules in four dtypes; errors change nothing."""

from __future__ import annotations

import copy
import os
import pickle
import random
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import Rule, SurgeryError, apply_rules, merge, plan_rules, remove, rule, unmerge
from surgery.rules import BiasRule, LoraRule, NormRule, TokensRule, TrainRule
from surgery.testing import Snapshot

EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "100"))
# A companion rule (`bias="all"`) skips the parameters that attention reads directly, with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*leaves out:surgery.errors.SurgeryWarning")

often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@rule("test-gate")
class GateRule(Rule):
    """A custom rule with a closed form that is not low-rank: it scales output features."""

    def rewrite(self, site: Any) -> Tensor:
        return site.output * site.param("gate", (site.out_features,), init=1.0)

    def merged(self, site: Any) -> dict[str, Tensor]:
        gate = site.params["gate"].detach().to(site.weight.dtype)
        changes = {"weight": gate.unsqueeze(1) * site.weight}
        if site.module._parameters.get("bias") is not None:
            changes["bias"] = gate * site.bias
        return changes


class Body(nn.Module):
    """Linear maps of all kinds in a row, on (batch, tokens) of ids."""

    def __init__(self, draw: random.Random):
        super().__init__()
        width = draw.choice([4, 6, 8])
        self.embed = nn.Embedding(12, width, padding_idx=draw.choice([None, 0]))
        self.blocks = nn.ModuleList()
        for _ in range(draw.randint(1, 3)):
            self.blocks.append(
                nn.ModuleDict(
                    {
                        "norm": draw.choice([nn.LayerNorm, nn.RMSNorm])(width),
                        "attention": nn.MultiheadAttention(width, 2, batch_first=True, bias=draw.random() < 0.5),
                        "up": nn.Linear(width, 2 * width, bias=draw.random() < 0.5),
                        "down": nn.Linear(2 * width, width),
                    }
                )
            )
        first: Any = self.blocks[0]
        groups = draw.choice([1, 2])
        self.conv = nn.Conv1d(
            width, width, 3, padding=1, groups=groups, padding_mode=draw.choice(["zeros", "circular"])
        )
        self.bn = nn.BatchNorm1d(width)
        if draw.random() < 0.3:
            self.again = first["up"]  # one module under two names
        self.head = nn.Linear(width, 12, bias=False)
        if draw.random() < 0.3:
            self.head.weight = self.embed.weight  # one parameter in two modules

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in cast(Any, self.blocks):
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["down"](torch.relu(block["up"](x)))
        x = self.bn(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x)


def model_of(draw: random.Random, dtype: torch.dtype) -> Body:
    torch.manual_seed(draw.randrange(2**31))
    model = Body(draw).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(draw.random() < 0.7)
    for module in model.modules():
        module.train(draw.random() < 0.5)
    if draw.random() < 0.3:
        model.head.register_forward_hook(lambda module, args, output: None)
    return model


def rules_from(draw: random.Random) -> list[Rule]:
    lora = LoraRule(
        targets=draw.choice([["up", "down"], [nn.Linear], ["attention"], ["conv", "embed"], "all-linear"]),
        exclude=draw.choice([(), ["head"]]) if draw.random() < 0.5 else ["head", "out_proj"],
        rank=draw.choice([1, 2, 4]),
        alpha=draw.choice([1, 3.5, 16]),
        rslora=draw.random() < 0.3,
        dora=draw.random() < 0.3,
        init=draw.choice(["kaiming", "gaussian", "random"]),
        bias=draw.choice(["none", "none", "lora_only", "all"]),
    )
    others: list[Rule] = [
        TrainRule("head"), NormRule(), BiasRule(), TokensRule("embed", tokens=[3, 1]), GateRule("down"),
        LoraRule(["up"], rank=2, init="pissa"), TrainRule("blocks"), NormRule("bn"),
    ]  # fmt: skip
    return [lora, *draw.sample(others, draw.choice([0, 0, 1, 2]))]


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.2)


def output(model: nn.Module) -> Tensor:
    ids = torch.arange(10).view(2, 5)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(ids).clone()
    for module, mode in modes:
        module.training = mode
    return logits


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # float16 overflows in some of them


@often
@given(st.integers(0, 2**32))
def test_apply_remove_and_merge_unmerge_restore_everything(seed: int) -> None:
    draw = random.Random(seed)
    model = model_of(draw, draw.choice(DTYPES))
    before, plain = Snapshot(model), output(model)
    names = []
    for name in ("first", "second", "third")[: draw.randint(1, 3)]:
        try:
            apply_rules(model, rules_from(draw), adapter=name)
            names.append(name)
        except SurgeryError:
            assert names or not before.differences(model)
    if not names:
        return
    disturb(model)
    live = output(model)
    within = Snapshot(model)
    try:
        report = merge(model, untie=draw.random() < 0.5, keep=draw.choice(["record", "copy"]))
    except SurgeryError:
        assert not within.differences(model)
    else:
        assert report.sites > 0
        if draw.random() < 0.5:
            disturb(model)  # training the adapter while it is merged does not reach the base
            live = None
        unmerge(model)
        if live is not None:
            same(output(model), live)
            assert not within.differences(model)
    draw.shuffle(names)
    waiting = list(names)
    for _ in range(10):
        for name in list(waiting):
            try:
                remove(model, name)
                waiting.remove(name)
            except SurgeryError as error:
                assert "first" in str(error.fix or "") + str(error)
        if not waiting:
            break
    assert not waiting
    assert before.differences(model) == []
    same(output(model), plain)


@settings(often, max_examples=max(20, EXAMPLES // 5))
@given(st.integers(0, 2**32))
def test_merged_is_live_in_double_precision(seed: int) -> None:
    draw = random.Random(seed)
    model = model_of(draw, torch.float64)
    try:
        for name in ("first", "second")[: draw.randint(1, 2)]:
            apply_rules(model, rules_from(draw), adapter=name)
    except SurgeryError:
        pass
    if not any("adapters." in name for name, _ in model.named_parameters()):
        return
    disturb(model)
    live = output(model)
    try:
        merge(model, untie=True)
    except SurgeryError:
        return
    # Sums in another order, in float64.
    torch.testing.assert_close(output(model), live, rtol=1e-7, atol=1e-7)


@settings(often, max_examples=max(20, EXAMPLES // 5))
@given(st.integers(0, 2**32))
def test_copies_and_pickles_are_reversible(seed: int) -> None:
    draw = random.Random(seed)
    model = model_of(draw, torch.float32)
    for module in model.modules():
        module._forward_hooks.clear()  # a lambda can't be pickled
    plain = output(model)
    try:
        apply_rules(model, rules_from(draw))
    except SurgeryError:
        return
    disturb(model)
    live, merged = output(model), True
    try:
        merge(model)
    except SurgeryError:
        merged = False
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if merged:
            unmerge(other)
        same(output(other), live)
        remove(other)
        same(output(other), plain)


def test_a_hundred_merges_in_bfloat16_drift_by_no_bit() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(48, 32)).to(torch.bfloat16)
    before = model[0].weight.detach().clone()
    for cycle in range(100):
        apply_rules(model, [LoraRule("0", rank=4, init="random")], adapter=f"a{cycle}")
        disturb(model)
        merge(model)
        unmerge(model)
        remove(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("wrong", ["rewrite", "initialise", "merged"])
def test_a_rule_that_fails_half_way_leaves_nothing(wrong: str) -> None:
    @rule(f"test-broken-{wrong}")
    class Broken(Rule):
        def rewrite(self, site: Any) -> Tensor:
            if wrong == "rewrite" and site.path == "1":
                raise ValueError("on purpose")
            return site.output + site.param("shift", (site.out_features,))

        def initialise(self, site: Any) -> None:
            if wrong == "initialise" and site.path == "1":
                raise ValueError("on purpose")

        def merged(self, site: Any) -> dict[str, Tensor]:
            if wrong == "merged" and site.path == "1":
                raise ValueError("on purpose")
            return {"bias": site.bias + site.params["shift"]}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = Snapshot(model)
    with pytest.raises((ValueError, SurgeryError)):
        apply_rules(model, [Broken(nn.Linear)])
        within = Snapshot(model)
        try:
            merge(model)
        finally:
            assert not within.differences(model)
            remove(model)
    assert not before.differences(model)
    assert plan_rules(model, [LoraRule("0")])
