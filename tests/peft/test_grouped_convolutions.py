"""LoRA and DoRA on convolutions with groups, in PEFT's files: PEFT's A reads all channels, its norms mix the groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import SurgeryError, apply_rules, load_adapter, merge, save_adapter
from surgery.rules import LoraRule
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Convolutions(nn.Module):
    def __init__(self, kind: Any, groups: int):
        super().__init__()
        self.convolution = kind(8, 16, 3, groups=groups, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.convolution(x))


def build(kind: Any, groups: int) -> nn.Module:
    torch.manual_seed(0)
    return Convolutions(kind, groups).eval()


def trained(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    for _ in range(5):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(x).detach()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("kind", "groups"), [(nn.Conv1d, 2), (nn.Conv2d, 4), (nn.Conv2d, 8), (nn.Conv3d, 2)], ids=str)
def test_peft_computes_the_same_from_the_file(kind: Any, groups: int, dora: bool, tmp_path: Path) -> None:
    model, x = build(kind, groups), torch.randn(2, 8, *[5] * int(kind.__name__[4]))
    apply_rules(model, LoraRule("convolution", rank=8, alpha=12, dora=dora, init="random"))
    expected = trained(model, x)
    assert not torch.allclose(expected, build(kind, groups)(x), atol=1e-2)
    save_adapter(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(kind, groups), tmp_path).eval()
    assert torch.allclose(theirs(x), expected, atol=1e-6)
    load_adapter(back := build(kind, groups), tmp_path)
    assert torch.allclose(back(x), expected, atol=1e-6)
    merge(back)  # which PEFT can't
    assert torch.allclose(back(x), expected, atol=1e-5)


def test_a_state_dict_brings_its_own_factors() -> None:
    """The magnitude of the file belongs to the factors of the file, and not to those that were there."""
    x = torch.randn(2, 8, 5, 5)
    config = ours.LoraConfig(r=4, use_dora=True, target_modules=["convolution"], init_lora_weights=False)
    first, second = (ours.get_peft_model(build(nn.Conv2d, 4), config) for _ in range(2))
    trained(first, x)
    assert not torch.allclose(second(x), first(x), atol=1e-3)
    ours.set_peft_model_state_dict(second, ours.get_peft_model_state_dict(first))
    assert torch.allclose(second(x), first(x), atol=1e-6)


def test_what_no_kernel_with_groups_does_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["convolution"], init_lora_weights=False)
    peft.get_peft_model(build(nn.Conv2d, 4), config).save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="looks at all channels"):
        load_adapter(build(nn.Conv2d, 4), tmp_path)
    model = apply_rules(build(nn.Conv2d, 4), LoraRule("convolution", rank=2))
    with pytest.raises(SurgeryError, match="a rank that the groups of a convolution don't divide"):
        save_adapter(model, tmp_path / "two", format="peft")
