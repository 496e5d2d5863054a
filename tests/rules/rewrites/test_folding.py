"""fold_batch_norm beside `torch.nn.utils.fusion`, which folds pairs that are named by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from surgery import PlanError, RuleError, SiteError, apply_rules, commit, remove, rules_from_json, rules_to_json
from surgery.rules.rewrites import FoldNormRule, fold_batch_norm
from tests.support.families import FAMILIES

PAIRS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 6, 3, groups=3, bias=False), nn.BatchNorm1d(6), (2, 3, 9)),
    (nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6, affine=False), (2, 3, 9, 9)),
    (nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6, eps=0.1), (2, 3, 5, 5, 5)),
    (nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 5, 5)),
    (nn.Linear(3, 6), nn.BatchNorm1d(6), (8, 3)),
]


def trained(*modules: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    model = nn.Sequential(*copy.deepcopy(modules)).train()
    for _ in range(3):
        model(torch.randn(shape))
    return model.eval()


@pytest.mark.parametrize("layer, norm, shape", PAIRS)
def test_bits_of_torchs_own_fold(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = trained(layer, norm, shape=shape), torch.randn(shape)
    pair: Any = copy.deepcopy(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    if isinstance(layer, nn.Linear):
        expected = fuse_linear_bn_eval(*pair)
    else:
        expected = fuse_conv_bn_eval(*pair, transpose=isinstance(layer, nn.ConvTranspose2d))
    apply_rules(model, fold_batch_norm(model, x))
    assert torch.equal(model(x), expected(x)) and torch.allclose(model(x), before, atol=1e-5)
    assert type(model[1]) is nn.Identity
    remove(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == list(state) and all(torch.equal(model.state_dict()[k], state[k]) for k in state)


class Twice(nn.Module):
    """One norm follows a layer whose output is used twice, the other a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.other = (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
                                                 nn.BatchNorm2d(3))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.norm(y) + self.other(self.b(self.b(x)))


def test_what_is_used_elsewhere_stays() -> None:
    with pytest.raises(SiteError, match="no BatchNorm follows"):
        fold_batch_norm(Twice().eval(), torch.randn(1, 3, 4, 4))
    linear = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(5)).eval()  # its channels are the second dimension
    with pytest.raises(SiteError, match="no BatchNorm follows"):
        fold_batch_norm(linear, torch.randn(2, 5, 3))


def test_training_mode_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(1, 3, 4, 4)
    rule = fold_batch_norm(model, x)
    with pytest.raises(SiteError, match="can't be folded in training"):
        fold_batch_norm(model.train(), x)
    with pytest.raises(PlanError, match="the norm is in training mode"):
        apply_rules(model, rule)
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(RuleError, match="fold_batch_norm finds them"):
        FoldNormRule("0")


def test_a_resnet() -> None:
    family = FAMILIES["resnet"]
    model, example = family.make().eval(), family.inputs()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            statistics: Any = module
            nn.init.normal_(statistics.running_mean)
            nn.init.uniform_(statistics.running_var, 0.5, 2)
    before = model(**example).logits
    rule = fold_batch_norm(model, example)
    assert rules_from_json(rules_to_json([rule])) == [rule]
    assert len(rule.norms or {}) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    apply_rules(model, rule)
    assert torch.allclose(model(**example).logits, before, atol=1e-5)
    remove(model)
    assert torch.equal(model(**example).logits, before)
    commit(apply_rules(model, rule))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert torch.allclose(model(**example).logits, before, atol=1e-5)
