"""OFT on Conv2d against PEFT: live, trained and as files both ways. It has no merged weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as facade
from surgery import MergeError, PlanError, SurgeryError, apply_rules, load_adapter, merge, save_adapter
from surgery.rules import OftRule
from tests.support.oft import FIELDS, assert_same, in_peft, train
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Image(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(6, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(image)).mean((-2, -1)))


TARGETS = ["conv", "head"]
MODELS: dict[str, Any] = {
    "one patch": lambda: Image(nn.Conv2d(4, 6, (5, 5), padding=2)),
    "many patches": lambda: Image(nn.Conv2d(4, 6, 3)),
    "padding and stride": lambda: Image(nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="reflect")),
    "groups": lambda: Image(nn.Conv2d(4, 6, 3, groups=2)),
    "1×1": lambda: Image(nn.Conv2d(4, 6, 1)),
    "1×1 with groups": lambda: Image(nn.Conv2d(4, 6, 1, groups=2)),
    "scaled": lambda: Image(Scaled(4, 6, 3)),
    "bfloat16": lambda: Image(nn.Conv2d(4, 6, 3)).bfloat16(),
}  # fmt: skip


def image(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 5, generator=generator).to(next(model.parameters()).dtype)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", FIELDS)
def test_oft_on_a_convolution_is_pefts(case: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    x, plain = image(model), copy.deepcopy(model)
    theirs = in_peft(model, image(model), TARGETS, FIELDS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = facade.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs", is_trainable=True)
    assert (theirs(x) - model(x)).abs().max() > 1e-3
    assert_same(ours(x), theirs(x))
    if case != "bounded":
        train(theirs, image(model))
        train(ours, image(model))
        assert_same(ours(x), theirs(x))
    save_adapter(ours.get_base_model(), tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    assert_same(back(x), ours(x))
    live = ours(x)
    if kind == "1×1":
        ours.merge_adapter()
        torch.testing.assert_close(ours(x), live, rtol=1e-5, atol=1e-5)
        ours.unmerge_adapter()
    else:
        with pytest.raises(MergeError, match="no weight computes the same"):
            ours.merge_adapter()
    assert torch.equal(ours(x), live)
    base = ours.unload()
    assert torch.equal(base(x), plain(x))
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_new_adapter_is_pefts() -> None:
    """At the identity the patches are added up already."""
    model = Image(nn.Conv2d(4, 6, 3))
    settings = {"target_modules": ["conv"], "oft_block_size": 4}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(**settings))
    ours = facade.get_peft_model(copy.deepcopy(model), facade.OFTConfig(**settings))
    assert torch.equal(ours(image(model)), theirs(image(model)))
    assert (ours(image(model)) - model(image(model))).abs().max() > 1e-2


def test_two_adapters_are_pefts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Image(nn.Conv2d(4, 6, 3))
    theirs = in_peft(model, image(model), TARGETS, {"oft_block_size": 4})
    theirs.add_adapter("other", peft.OFTConfig(target_modules=["conv"], oft_block_size=6, init_weights=False))
    theirs.save_pretrained(tmp_path)
    theirs.base_model.set_adapter(["default", "other"])
    ours: Any = facade.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    ours.load_adapter(tmp_path / "other", "other")
    ours.base_model.set_adapter(["default", "other"])
    assert_same(ours(image(model)), theirs(image(model)))


def test_an_input_without_a_batch() -> None:
    torch.manual_seed(0)
    model = apply_rules(nn.Sequential(nn.Conv2d(4, 6, 3)), [OftRule("0", block_size=4, patches=True, init="random")])
    x = torch.randn(2, 4, 5, 7)
    assert_same(torch.stack([model(row) for row in x]), model(x))


def test_errors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2))
    for library in (peft, facade):
        with pytest.raises(ValueError, match="Conv2d with dilation > 1 is not supported by OFT"):
            library.get_peft_model(copy.deepcopy(model), library.OFTConfig(target_modules=["0"], oft_block_size=4))
    with pytest.raises(PlanError, match="block_size=5 does not divide the 36 numbers"):
        apply_rules(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), [OftRule("0", block_size=5, patches=True)])
    turned = nn.Sequential(nn.Conv2d(4, 6, 3))
    base = copy.deepcopy(turned.state_dict())
    apply_rules(turned, [OftRule("0", block_size=4, init="random")])
    with pytest.raises(SurgeryError, match="can't hold the OFT of a Conv2d's weight"):
        save_adapter(turned, tmp_path, format="peft")  # PEFT would compute another function with the same tensors
    save_adapter(turned, tmp_path)
    image = torch.randn(1, 4, 5, 5)
    live = turned(image)
    merge(turned)
    torch.testing.assert_close(turned(image), live)
    again = nn.Sequential(nn.Conv2d(4, 6, 3))
    again.load_state_dict(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(image), live)
