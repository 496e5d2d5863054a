"""LoRA and its inverse on every kind of linear map, against the untouched module and plain arithmetic."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rules import LoraRule, NormRule, TokensRule, TrainRule
from surgery import Pattern, PlanError, SurgeryError, apply_rules, merge, plan_rules, remove, summary, unmerge


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


def cases() -> dict[str, tuple[nn.Module, tuple]]:
    torch.manual_seed(0)
    image, ids = torch.randn(2, 4, 9, 9), torch.randint(0, 10, (2, 5))
    q, kv = torch.randn(5, 2, 8), (torch.randn(7, 2, 4), torch.randn(7, 2, 6))
    return {
        "linear": (nn.Linear(8, 6), (torch.randn(3, 8),)),
        "linear3d": (nn.Linear(8, 6, bias=False), (torch.randn(2, 3, 8),)),
        "conv1d-reflect": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (torch.randn(2, 4, 9),)),
        "conv2d-dilated": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), (image,)),
        "conv2d-groups": (nn.Conv2d(4, 8, 3, groups=2), (image,)),
        "conv2d-depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"), (image,)),
        "conv3d": (nn.Conv3d(2, 4, 2), (torch.randn(1, 2, 4, 4, 4),)),
        "embedding": (nn.Embedding(10, 6, padding_idx=1), (ids,)),
        "scaled-embedding": (Scaled(10, 6), (ids,)),
        "same-padding": (SamePadding(4, 6, 3), (image,)),
        "standardised": (Standardised(4, 6, 3), (image,)),
        "attention": (nn.MultiheadAttention(8, 2), (q, q, q)),
        "attention-kdim": (nn.MultiheadAttention(8, 2, kdim=4, vdim=6), (q, *kv)),
    }


def run(module: nn.Module, args: tuple) -> Tensor:
    output = module(*args)
    return output[0] if isinstance(output, tuple) else output


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in f".{name}":
                parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("name", cases())
def test_apply_merge_unmerge_remove(name: str, fields: dict[str, Any]) -> None:
    module, args = cases()[name]
    module.eval()
    untouched = copy.deepcopy(module)
    apply_rules(module, [LoraRule(Pattern.type(type(untouched)), rank=2, **fields)], example_inputs=args)
    assert torch.equal(run(module, args), run(untouched, args))
    disturb(module)
    live = run(module, args)
    assert (live - run(untouched, args)).abs().max() > 0.1
    merge(module)
    assert type(module) is type(untouched)
    # One float32 rounding of the weight beside one of the branch.
    torch.testing.assert_close(run(module, args), live, rtol=1e-4, atol=1e-4)
    unmerge(module)
    assert torch.equal(run(module, args), live)
    remove(module)
    assert type(module) is type(untouched) and list(module.state_dict()) == list(untouched.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), untouched.state_dict().values(), strict=True)
    )
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_attention_changes_the_output_map_once() -> None:
    torch.manual_seed(0)
    module: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 5, 8)
    apply_rules(module, [LoraRule(nn.MultiheadAttention, rank=2, alpha=6)])
    disturb(module)
    held = module.adapters.default
    with torch.no_grad():
        reference.in_proj_weight += 3 * held.B @ held.A
        reference.out_proj.weight += 3 * held.out_B @ held.out_A
    torch.testing.assert_close(module(x, x, x)[0], reference(x, x, x)[0])


def test_linear_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(4, 8)
    apply_rules(model, [LoraRule("0", rank=4, alpha=2)])
    disturb(model)
    W, b, A, B = model[0].weight, model[0].bias, model[0].adapters.default.A, model[0].adapters.default.B
    torch.testing.assert_close(model(x), x @ W.T + b + 0.5 * (x @ A.T) @ B.T)


def test_pissa_gives_the_bits_back() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 12))
    before = model[0].weight.detach().clone()
    apply_rules(model, [LoraRule("0", rank=4, init="pissa")])
    assert not torch.equal(model[0].weight, before)
    remove(model)
    assert torch.equal(model[0].weight, before)


def test_pickle_and_deepcopy() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), [LoraRule("0", rank=2, init="random")])
    x = torch.randn(3, 8)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        assert type(remove(other)[0]) is nn.Linear


def test_train_norm_and_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randint(0, 10, (2, 4))
    output = model(x)
    apply_rules(model, [TokensRule("0", tokens=[7, 2]), NormRule("1"), TrainRule("2")], example_inputs=x)
    assert torch.equal(model(x), output)
    disturb(model)
    live = model(x)
    assert not torch.equal(live, output)
    merge(model)
    torch.testing.assert_close(model(x), live)
    remove(unmerge(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refusals_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    kinds = [type(module) for module in model.modules()]
    for rules in ([LoraRule("nothing")], [LoraRule("0", expect=2)], [LoraRule("0"), LoraRule("0", rank=2)]):
        with pytest.raises(PlanError):
            apply_rules(model, rules)
        assert not plan_rules(model, rules)
    with pytest.raises(SurgeryError):
        LoraRule("0", rank=0)
    assert [type(module) for module in model.modules()] == kinds
    assert summary(model).added == 0 and all(p.requires_grad for p in model.parameters())
