"""AdaLoraRule in training: ranks and the orthogonal loss, against PEFT's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import RuleError, apply_rules
from surgery.rules import AdaLoraRule, BiasRule, LoraRule, RankAllocator, orthogonal_loss
from tests.support.delta_methods import assert_close, foreign


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@foreign
@pytest.mark.parametrize("fields", [{}, {"deltaT": 3, "tinit": 2, "tfinal": 3}, {"target_r": 5}], ids=str)
def test_ranks_are_shared_out_as_in_peft(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    fields = {"target_r": 2, "total_step": 12, **fields}
    model = Two()
    config = peft.AdaLoraConfig(init_r=4, target_modules=["a", "b"], **fields)
    if fields["target_r"] > 4:
        fields["target_r"] = config.target_r = 3
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours: Any = apply_rules(model, [AdaLoraRule(["a", "b"], rank=4, **fields)])
    layers = {name: getattr(theirs.base_model.model, name) for name in "ab"}
    with torch.no_grad():
        for name, layer in layers.items():
            for key in "AEB":
                tensor = getattr(layer, f"lora_{key}")["default"]
                tensor.normal_(std=0.3)
                getattr(getattr(ours, name).adapters.default, key).copy_(tensor)
    allocator = RankAllocator(ours)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for step in range(1, 13):
        x, target = torch.randn(7, 6), torch.randn(7, 4)
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(each(x), target).backward()
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        for name, layer in layers.items():
            E = getattr(ours, name).adapters.default.E
            assert torch.equal(E == 0, layer.lora_E["default"] == 0), step
            assert_close(E, layer.lora_E["default"], 1e-5)
    assert sum(int(mask.sum()) for mask in allocator.kept.values()) == 2 * fields["target_r"]


@foreign
def test_the_orthogonal_loss_is_pefts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")

    class WithLoss(Two):
        def forward(self, x: Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(loss=super().forward(x).square().mean())

    model, x = WithLoss(), torch.randn(3, 6)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.AdaLoraConfig(init_r=4, target_modules=["a", "b"], total_step=9)
    )
    ours: Any = apply_rules(model, [AdaLoraRule(["a", "b"], rank=4, total_step=9), BiasRule("b")], adapter="one")
    with torch.no_grad():
        for name in "ab":
            for key in "AEB":
                tensor = getattr(getattr(theirs.base_model.model, name), f"lora_{key}")["default"]
                getattr(getattr(ours, name).adapters.one, key).copy_(tensor.normal_())
    assert_close(ours(x).loss + orthogonal_loss(ours, "one"), theirs.base_model(x).loss)


def test_ranks_can_not_be_shared_out() -> None:
    model = apply_rules(Two(), [AdaLoraRule("a")])
    with pytest.raises(RuleError, match="no total_step"):
        RankAllocator(model)
    model = apply_rules(Two(), [AdaLoraRule("a", total_step=5)])
    with pytest.raises(RuleError, match="a: A has no gradient"):
        RankAllocator(model).update_and_allocate(1)
    model = apply_rules(Two(), [LoraRule("a")])
    with pytest.raises(RuleError, match="0 AdaLoraRules"):
        orthogonal_loss(model)
