"""InsertRule against a model in which the modules were put one behind the other by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    PlanError,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    load_adapter,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    save_adapter,
)
from surgery.authoring.module_skeleton import Skeleton
from surgery.authoring.skeleton_parts import named_tensors
from surgery.rules import InsertRule, LoraRule
from surgery.testing import Snapshot
from tests.support import foreign

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
Placement = Literal["after", "before"]


def make_mlp(size: int, factor: int = 2) -> nn.Module:
    """A function that a rule names."""
    return nn.Sequential(nn.Linear(size, factor * size), nn.GELU(), nn.Linear(factor * size, size))


def host() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def by_hand(model: Any, rule: InsertRule, placement: Placement) -> Any:
    """A plain model with the adapter's own values."""
    other = rule.make()
    tensors = {key.removeprefix("2.adapters."): tensor for key, tensor in adapter_state_dict(model).items()}
    own = named_tensors(other)
    with torch.no_grad():
        for word, name in Skeleton.of(other).words.items():
            own[name].copy_(tensors[word])
    plain = host()
    order = [plain[2], other] if placement == "after" else [other, plain[2]]
    return nn.Sequential(plain[0], plain[1], *order)


MAKERS: dict[str, dict[str, Any]] = {
    "class": {"by": "torch.nn.LayerNorm", "kwargs": {"normalized_shape": 4}},
    "function": {"by": make_mlp, "kwargs": {"size": 4, "factor": 3}},
    "forward with branches": {"by": foreign.Deciding, "kwargs": {"size": 4}},
    "buffers": {"by": foreign.Normal, "kwargs": {"size": 4}},
}


@pytest.mark.parametrize("placement", ["after", "before"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_computes_and_trains_as_a_model_built_so(name: str, placement: Placement) -> None:
    rule = InsertRule("2", placement=placement, **MAKERS[name])
    model = apply_rules(host(), rule, freeze=False)
    plain = by_hand(model, rule, placement)
    optimizers = [torch.optim.SGD(item.parameters(), lr=0.05) for item in (model, plain)]
    for _ in range(3):
        assert torch.equal(model(X), plain(X))
        for item, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            item(X).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.eval()(X), plain.eval()(X))
    assert torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("placement", ["after", "before"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_saved_loaded_copied_and_removed(name: str, placement: Placement, tmp_path: Path) -> None:
    model = host()
    before = Snapshot(model)
    rule = InsertRule("2", placement=placement, **MAKERS[name])
    assert rules_from_json(rules_to_json([rule])) == [rule]
    apply_rules(model, rule)
    expected = model.eval()(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        assert torch.equal(remove(other)(X), host()(X))
    save_adapter(model, tmp_path)
    with pytest.raises(SurgeryError, match="trust"):
        load_adapter(host(), tmp_path)
    load_adapter(again := host(), tmp_path, trust=True)
    assert torch.equal(again.eval()(X), expected)
    with pytest.raises(PlanError, match="adds a computation"):
        merge(model)
    remove(model.train())
    assert not before.differences(model)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        return self.map(x), cache


@pytest.mark.parametrize("placement", ["after", "before"])
def test_the_first_tensor_of_a_tuple_and_the_other_items(placement: Placement) -> None:
    layer = Layer()
    apply_rules(layer, InsertRule("", by=nn.Tanh, placement=placement))
    y, cache = layer(X, cache="kept")
    own = layer.map
    assert torch.equal(y, torch.tanh(own(X)) if placement == "after" else own(torch.tanh(X))) and cache == "kept"


def test_beside_other_rules_and_in_half_precision() -> None:
    model = host().bfloat16()
    rules = [LoraRule("2", rank=2, init="random"), InsertRule("2", by=nn.LayerNorm, kwargs={"normalized_shape": 4})]
    apply_rules(model, rules)
    x = X.bfloat16()
    norm = model[2].adapters.default
    assert norm.weight.dtype == torch.float32
    lora = apply_rules(copy.deepcopy(host()).bfloat16(), rules[0])
    with torch.no_grad():
        for name in ("A", "B"):
            lora[2].adapters.default._parameters[name].copy_(norm._parameters[name])
    expected = nn.functional.layer_norm(lora(x).float(), (4,), norm.weight, norm.bias).bfloat16()
    assert torch.equal(model(x), expected)


def test_a_frozen_module_adds_nothing_to_train() -> None:
    model = apply_rules(host(), InsertRule("2", by=make_mlp, kwargs={"size": 4}, trainable=False))
    assert not [name for name, p in model.named_parameters() if "adapters" in name and p.requires_grad]


def test_what_is_wrong_is_told() -> None:
    for fields in ({}, {"by": 3}, {"by": "no name"}, {"by": nn.ReLU(), "kwargs": {"inplace": True}}):
        with pytest.raises(RuleError):
            InsertRule("2", **fields)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="placement"):
        InsertRule("2", by=nn.ReLU, placement="beside")  # type: ignore[arg-type]
    for by, text in (("torch.nn.Nothing", "importable"), ("math.sqrt", "importable"), (nn.Linear, "can't be made")):
        plan = plan_rules(host(), InsertRule("2", by=by))
        assert text in str(plan.problems[0]), by
    with pytest.raises(PlanError, match="one rule of a kind"):
        apply_rules(host(), [InsertRule("2", by=nn.ReLU), InsertRule("2", by=nn.Tanh)])
