"""LoRA and its inverse on every kind of linear map, against the untouched module and plain arithmetic."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    Pattern,
    PlanError,
    Rule,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    load_adapter_state_dict,
    merge,
    plan_rules,
    remove,
    rule,
    rules_of,
    summary,
    unmerge,
)
from surgery.rules import LoraRule, NormRule, TokensRule, TrainRule
from surgery.testing import Snapshot


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
        "conv1d-no-batch": (nn.Conv1d(4, 6, 3), (torch.randn(4, 8),)),
        "conv2d-no-batch": (nn.Conv2d(4, 6, 3), (torch.randn(4, 6, 6),)),
        "conv3d-no-batch": (nn.Conv3d(2, 4, 2), (torch.randn(2, 4, 4, 4),)),
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
    params = module.adapters.default
    with torch.no_grad():
        reference.in_proj_weight += 3 * params.B @ params.A
        reference.out_proj.weight += 3 * params.out_B @ params.out_A
    torch.testing.assert_close(module(x, x, x)[0], reference(x, x, x)[0])


def test_linear_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(4, 8)
    apply_rules(model, [LoraRule("0", rank=4, alpha=2)])
    disturb(model)
    W, b, A, B = model[0].weight, model[0].bias, model[0].adapters.default.A, model[0].adapters.default.B
    torch.testing.assert_close(model(x), x @ W.T + b + 0.5 * (x @ A.T) @ B.T)


class Curved(nn.Conv2d):
    """A forward that is not a linear map of the weight, so the rule edits the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.sinh(), self.bias)


def with_zeros() -> dict[str, tuple[Any, tuple, dict[str, str]]]:
    """A module, its input, and its adapted weights, by prefix; output features 0 and 1 of each have weight zero."""
    torch.manual_seed(0)
    q, image = torch.randn(5, 2, 8), torch.randn(2, 4, 5, 5)
    ids = torch.randint(0, 10, (2, 5))
    result: Any = {
        "linear": (nn.Linear(8, 6), (torch.randn(3, 8),), {"": "weight"}),
        "linear-no-bias": (nn.Linear(8, 6, bias=False), (torch.randn(3, 8),), {"": "weight"}),
        "conv2d": (nn.Conv2d(4, 6, 3), (image,), {"": "weight"}),
        "embedding": (nn.Embedding(10, 6), (ids,), {"": "weight"}),
        "weight-space": (Curved(4, 6, 3), (image,), {"": "weight"}),
        "attention": (nn.MultiheadAttention(8, 2), (q, q, q), {"": "in_proj_weight", "out_": "out_proj.weight"}),
    }
    for module, _, weights in result.values():
        for weight in weights.values():
            features(module, module.get_parameter(weight).data)[:2] = 0.0
    return result


def features(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of the weight as a matrix with a row for each output feature."""
    return weight.t() if isinstance(module, nn.Embedding) else weight.flatten(1)


@pytest.mark.parametrize("name", with_zeros())
def test_dora_where_a_features_weight_is_zero(name: str) -> None:
    """Feature 0 stays zero, B gives feature 1 a direction, and the others follow DoRA's formula."""
    module, args, weights = with_zeros()[name]
    untouched = copy.deepcopy(module)
    apply_rules(module, [LoraRule(type(module), rank=2, alpha=6, dora=True)], example_inputs=args)
    assert torch.equal(run(module, args), run(untouched, args))
    run(module, args).square().sum().backward()
    disturb(module)
    reference, params = copy.deepcopy(untouched), module.adapters.default
    for prefix, weight in weights.items():
        A, B, magnitude = (params.get_parameter(prefix + each) for each in ("A", "B", "magnitude"))
        assert B.grad is not None and B.grad.isfinite().all() and magnitude.grad is not None
        assert not magnitude.grad.flatten()[:2].any() and magnitude.grad.isfinite().all()
        with torch.no_grad():
            B[0] = 0.0
            V = features(reference, reference.get_parameter(weight).data)
            V += 3.0 * B.flatten(1) @ A.flatten(1)
            V[1:] *= (magnitude.flatten() / V.norm(dim=1))[1:, None]
            assert not V[0].any() and V[1].any()
    live = run(module, args)
    torch.testing.assert_close(live, run(reference, args), rtol=1e-4, atol=1e-5)
    live.square().sum().backward()
    for prefix in weights:  # B gives feature 0 a direction, and its magnitude has none to learn from yet
        B, magnitude = params.get_parameter(prefix + "B"), params.get_parameter(prefix + "magnitude")
        assert B.grad[0].isfinite().all() and magnitude.grad.isfinite().all() and not magnitude.grad.flatten()[0]
    merge(module)
    torch.testing.assert_close(run(module, args), live, rtol=1e-4, atol=1e-5)
    unmerge(module)
    assert torch.equal(run(module, args), live)
    remove(module)
    for weight in weights.values():
        assert torch.equal(module.get_parameter(weight), untouched.get_parameter(weight))


def test_dora_trains_a_layer_that_starts_at_zero() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight)
    x, expected = torch.randn(64, 8), torch.randn(8, 3)
    apply_rules(model, [LoraRule("0", rank=4, dora=True)])
    params = model[0].adapters.default
    first = torch.autograd.grad((model(x) - x @ expected).square().sum(), list(params.parameters()), retain_graph=True)
    bias = model[0].bias
    by_hand = 2.0 * (2.0 * (bias - x @ expected)).t() @ (x @ params.A.t())  # LoRA's own: the gain is 1
    torch.testing.assert_close(dict(zip(dict(params.named_parameters()), first, strict=True))["B"], by_hand)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(200):
        loss = (model(x) - bias.detach() - x @ expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0] and params.magnitude.all()


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


def test_tensors_go_back_into_the_same_rules() -> None:
    trained = apply_rules(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), [LoraRule(nn.Linear, rank=2)], adapter="a")
    disturb(trained)
    tensors = adapter_state_dict(trained, "a")
    other = apply_rules(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), rules_of(trained), adapter="b")
    load_adapter_state_dict(other, tensors, "b")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adapter_state_dict(other, "b").items())
    before = Snapshot(other)
    wrong = {**tensors, "0.adapters.A": torch.ones(3, 6), "0.adapters.C": torch.ones(1)}
    del wrong["1.adapters.B"]
    with pytest.raises(SurgeryError) as message:
        load_adapter_state_dict(other, wrong, "b")
    for part in ("1.adapters.B is missing", "0.adapters.C is unknown", "(3, 6), not (2, 6)"):
        assert part in str(message.value)
    assert before.differences(other) == []


def test_several_adapters_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    x, base = torch.randn(3, 6), model(torch.zeros(1, 6))
    for name in "abc":
        apply_rules(model, [LoraRule("0", rank=2)], adapter=name)
    disturb(model)
    live = model(x)
    merge(model, ["a", "c"])
    torch.testing.assert_close(model(x), live)
    unmerge(model)
    remove(model, ["a", "b"])
    assert [name for name, _ in model.named_parameters() if "adapters" in name] == [
        "0.adapters.c.A",
        "0.adapters.c.B",
    ]
    with pytest.raises(SurgeryError, match="no adapter 'a'"):
        remove(model, ["c", "a"])
    assert torch.equal(remove(model)(torch.zeros(1, 6)), base)


def test_a_dropout_that_would_never_stop_is_refused() -> None:
    @rule("test-always-dropping")
    class Dropping(Rule):
        how: str = "module"

        def rewrite(self, site: Any) -> Any:
            if self.how == "module":
                return nn.Dropout(0.5)(site.output)
            return F.dropout(site.output, 0.5) if self.how == "default" else F.dropout(site.output, 0.5, site.training)

    for how in ("module", "default"):
        with pytest.raises(SurgeryError, match="always training"):
            apply_rules(nn.Sequential(nn.Linear(4, 4)), [Dropping("0", how=how)])
    model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [Dropping("0", how="flag")])
    x = torch.randn(2, 4)
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model(x))


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
