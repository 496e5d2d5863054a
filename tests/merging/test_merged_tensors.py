"""Tensors of a merged adapter take no other values: the base's weights hold the change of the former ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import (
    SurgeryError,
    activate,
    adapter_state_dict,
    apply_rules,
    forget,
    hotswap,
    load_adapter_state_dict,
    merge,
    pad_rank,
    remove,
    unmerge,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot

X = torch.randn(3, 8)


def adapted(*names: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    torch.manual_seed(seed)
    for name in names:
        apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter=name)
    return model


def own_state(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict({**model.state_dict(), **select(other)})


def select(other: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in other.state_dict().items() if ".adapters.a." in key}


DOORS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "load_adapter_state_dict": lambda m, o: load_adapter_state_dict(m, adapter_state_dict(o, "a"), "a"),
    "load_state_dict": own_state,
    "load_state_dict of adapters alone": lambda m, o: m.load_state_dict(select(o), strict=False),
    "load_state_dict by assignment": lambda m, o: m.load_state_dict(select(o), strict=False, assign=True),
    "load_state_dict of a wrapper": lambda m, o: nn.DataParallel(m).load_state_dict(nn.DataParallel(o).state_dict()),
    "load_state_dict of a host": lambda m, o: nn.ModuleList([m]).load_state_dict(nn.ModuleList([o]).state_dict()),
    "hotswap": lambda m, o: hotswap(m, "a", adapter_state_dict(o, "a")),
    "pad_rank": lambda m, o: pad_rank(m, "a", 4),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_merged_adapter_takes_no_other_values(door: str) -> None:
    model, other = adapted("a"), adapted("a", seed=1)
    plain = model(X)
    merge(model)
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="the model is merged\n  where: 0\n  why:   its weights hold a") as error:
        DOORS[door](model, other)
    assert error.value.fix == "unmerge(model) first" and before.differences(model) == []
    unmerge(model)
    assert torch.equal(model(X), plain)
    DOORS[door](model, other)
    torch.testing.assert_close(model(X), plain if door == "pad_rank" else other(X))


def test_its_own_state_goes_back_in() -> None:
    model = adapted("a")
    plain = model(X)
    merge(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for loaded in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loaded.load_state_dict(state)
        with pytest.raises(SurgeryError, match="the model is merged"):
            loaded.load_state_dict(select(adapted("a", seed=1)), strict=False)
    unmerge(model)
    assert torch.equal(model(X), plain)


def test_another_adapter_takes_values_beside_a_merged_one() -> None:
    model, other = adapted("a", "b"), adapted("b", seed=1)
    expected = adapted("a", "b")
    load_adapter_state_dict(expected, adapter_state_dict(other, "b"), "b")
    doors: list[Callable[[], Any]] = [
        lambda: load_adapter_state_dict(model, adapter_state_dict(other, "b"), "b"),
        lambda: hotswap(model, "b", adapter_state_dict(other, "b")),
        lambda: model.load_state_dict(
            {key: tensor for key, tensor in other.state_dict().items() if "adapters" in key}, strict=False
        ),
        lambda: (pad_rank(model, "b", 4), hotswap(model, "b", adapter_state_dict(other, "b"), rules=rule)),
    ]
    rule = LoraRule(["0", "2"], rank=2, init="random")
    for door in doors:
        model = adapted("a", "b")
        merge(model, "a")
        door()
        torch.testing.assert_close(model(X), expected(X))
        unmerge(model)
        torch.testing.assert_close(model(X), expected(X))


def test_weights_of_a_merge_are_not_taken_for_the_bases() -> None:
    """The magnitudes of DoRA start from the base's weight, which can't be read while another adapter is merged."""
    model = adapted("a")
    apply_rules(model, LoraRule("0", rank=2, dora=True), adapter="b")
    tensors = {key: tensor for key, tensor in adapter_state_dict(model, "b").items() if not key.endswith("magnitude")}
    assert len(tensors) == len(adapter_state_dict(model, "b")) - 1
    activate(model, "a")
    merge(model, "a")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="merged"):
        hotswap(model, "b", tensors, strict=False)
    assert before.differences(model) == []


def test_nothing_stays_after_a_merge() -> None:
    model = adapted("a")
    for _ in range(2):
        merge(model)
        assert len(model._load_state_dict_pre_hooks) == 1
        unmerge(model)
        assert not model._load_state_dict_pre_hooks
    merge(model)
    assert not forget(model)._load_state_dict_pre_hooks
    assert not remove(adapted("a"))._load_state_dict_pre_hooks


def test_pefts_functions_refuse_it() -> None:
    config = ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    base = nn.Sequential(nn.Linear(8, 8))
    model, other = (ours.get_peft_model(copy.deepcopy(base), config) for _ in range(2))
    model.merge_adapter()
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="the model is merged") as error:
        ours.set_peft_model_state_dict(model, ours.get_peft_model_state_dict(other))
    assert isinstance(error.value, SurgeryError) and before.differences(model) == []
    with pytest.raises(RuntimeError, match="the model is merged") as error:
        model.load_state_dict(other.state_dict())
    assert isinstance(error.value, SurgeryError) and before.differences(model) == []
    model.unmerge_adapter()
    ours.set_peft_model_state_dict(model, ours.get_peft_model_state_dict(other))
    torch.testing.assert_close(model(X), other(X))
