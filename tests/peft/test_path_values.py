"""FourierFT's `n_frequency_pattern` and C3A's `block_size_pattern` against PEFT, with its way to match patterns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as facade
from surgery import PlanError, RuleError, adapter_state_dict, apply_rules, load_adapter, save_adapter
from surgery.rules import C3aRule, FourierRule
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(x) * torch.tanh(self.down(x))).unflatten(-1, (2, 8)).sum(-2)


class Stack(nn.Module):
    """Has modules of one name at the top and inside of a block. No adapter is behind another: PEFT's C3A passes wrong
    gradients on, see test_peft_passes_wrong_gradients_through_c3a."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.block, self.down = nn.Linear(8, 8), Block(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.up(x) * torch.tanh(self.down(x))


METHODS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "fourier": ("FourierFTConfig", "n_frequency", {"n_frequency": 6, "scaling": 20.0}, FourierRule),
    "c3a": ("C3AConfig", "block_size", {"block_size": 8}, C3aRule),
}
PATTERNS: dict[str, dict[str, int]] = {
    "names": {"up": 4, "down": 2},
    "a whole path": {"block.up": 4},
    "an expression": {r"block\..*": 2},
    "a name before a whole path": {"block.up": 4, "up": 2},  # PEFT takes up for block.up
    "an expression that follows no dot": {".*p": 4},  # which PEFT does not find for up
    "alternatives": {"up|block.down": 2},  # the second of which PEFT reads as `block.down$`
    "no site": {"nowhere": 4},
}


def in_peft(model: nn.Module, name: str, patterns: dict[str, int]) -> Any:
    config, number, fields, _ = METHODS[name]
    config = getattr(peft, config)(target_modules=["up", "down"], **fields, **{f"{number}_pattern": patterns})
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return theirs


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)  # float32; sums in another order


def train(model: Any, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_a_pattern_is_pefts(name: str, patterns: dict[str, int], tmp_path: Path) -> None:
    model, x = Stack(), torch.randn(3, 8)
    theirs = in_peft(model, name, patterns)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = facade.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs", is_trainable=True)
    assert (theirs(x) - model(x)).abs().max() > 1e-2
    assert_same(ours(x), theirs(x))
    train(theirs, x)
    train(ours, x)
    assert_same(ours(x), theirs(x))
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert_same(again(x), ours(x))
    assert_same(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_a_new_adapter_has_pefts_shapes(name: str, patterns: dict[str, int]) -> None:
    config, number, fields, _ = METHODS[name]
    config = getattr(facade, config)(target_modules=["up", "down"], **fields, **{f"{number}_pattern": patterns})
    ours = facade.get_peft_model(Stack(), config)
    shapes = {key: tensor.shape for key, tensor in facade.get_peft_model_state_dict(ours).items()}
    theirs = peft.get_peft_model_state_dict(in_peft(Stack(), name, patterns))
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_a_rules_pattern_is_kept_in_pefts_format(name: str, patterns: dict[str, int], tmp_path: Path) -> None:
    """A rule matches patterns as LoRA's rank_pattern; the file has patterns that PEFT reads so."""
    _, number, fields, kind = METHODS[name]
    rule = kind(["up", "block.*", "down"], **fields, **{f"{number}_pattern": patterns}, init=START[name])
    model, x = Stack(), torch.randn(3, 8)
    if "nowhere" in patterns:
        with pytest.raises(PlanError, match=f"{number}_pattern has 'nowhere'"):
            apply_rules(model, [rule])
        return
    ours = apply_rules(copy.deepcopy(model), [rule])
    save_adapter(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_same(theirs(x), ours(x))
    again = copy.deepcopy(model)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), ours(x))
    shapes = [{key: tensor.shape for key, tensor in adapter_state_dict(m).items()} for m in (again, ours)]
    assert shapes[0] == shapes[1]


START = {"fourier": "random", "c3a": "gaussian"}


@pytest.mark.parametrize("name", METHODS)
def test_a_pattern_that_peft_reads_alike_stays_as_it_is(name: str, tmp_path: Path) -> None:
    _, number, fields, kind = METHODS[name]
    ours = apply_rules(Stack(), [kind(["up", "down"], **fields, **{f"{number}_pattern": {"up": 4}})])
    save_adapter(ours, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())[f"{number}_pattern"] == {"up": 4}


@pytest.mark.parametrize("name", METHODS)
def test_bad_patterns_are_refused(name: str) -> None:
    _, number, fields, kind = METHODS[name]
    for bad in ({"up": 0}, {"up": 2.0}, {"up": True}, {"(": 2}, ["up"], {3: 2}):
        with pytest.raises(RuleError, match=f"{number}_pattern"):
            kind("up", **fields, **{f"{number}_pattern": bad})
    most = {"fourier": 65, "c3a": 3}[name]
    with pytest.raises(PlanError, match=str(most)):
        apply_rules(Stack(), [kind(["up", "down"], **fields, **{f"{number}_pattern": {"down": most}})])
