"""RewriteRule against models in which the operations were written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, RuleError, apply_rules, maybe, module_of, remove, rules_from_json, rules_to_json
from surgery.rules import RewriteRule, rewrite_pattern
from tests.support.tiny import bert, gpt2


class Attention(nn.Module):
    def __init__(self, size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(size, 3 * size), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return (torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v).transpose(1, 2).flatten(2)


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)


def scores(q: Any, k: Any, v: Any, scale: Any) -> Any:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def masked(q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
    return maybe(q @ k.mT * scale + mask).softmax(-1) @ v


def masked_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def test_the_rewritten_forward_has_the_bits_of_the_one_written_by_hand() -> None:
    model, by_hand, x = Attention(), Fused(), torch.randn(2, 5, 8)
    by_hand.load_state_dict(model.state_dict())
    before = model(x)
    apply_rules(model, RewriteRule(pattern=scores, replacement=fused), example_inputs=x)
    assert torch.equal(model(x), by_hand(x))
    assert torch.equal(model(x[:, :3]), by_hand(x[:, :3]))
    remove(model)
    assert type(model) is Attention and torch.equal(model(x), before)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_attentions_of_a_registry(make: Any) -> None:
    model, example = make()
    model.eval().set_attn_implementation("eager")
    before = model(**example)[0]
    apply_rules(model, RewriteRule(pattern=masked, replacement=masked_fused, training="eval"), example_inputs=example)
    assert torch.allclose(model(**example)[0], before, atol=1e-6) and not torch.equal(model(**example)[0], before)
    remove(model)
    assert torch.equal(model(**example)[0], before)


def test_the_rule_is_data() -> None:
    rule = RewriteRule(pattern=scores, replacement=fused, training="eval")
    assert rule.pattern == "tests.rules.test_rewrite.scores" and rules_from_json(rules_to_json([rule])) == [rule]
    with pytest.raises(RuleError, match="can't be written"):
        rules_to_json([RewriteRule(pattern=lambda x: x.relu(), replacement=lambda x: x)])


def test_bad_functions() -> None:
    with pytest.raises(RuleError, match="the replacement .* has the parameter y"):
        RewriteRule(pattern=lambda x: x.relu(), replacement=lambda x, y: x)
    with pytest.raises(RuleError, match="is not a pattern"):
        RewriteRule(pattern=lambda x: 1, replacement=lambda x: x)


class Block(nn.Module):
    """Three projections of one input, and a convolution before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = (q @ k.mT).softmax(-1)
        return self.norm(self.conv((weights @ v).mT)), weights


def projections(x: Any, q: Any = module_of(nn.Linear), k: Any = module_of(nn.Linear), v: Any = module_of(nn.Linear)):
    return q(x), k(x), v(x)


def joint(x: Tensor, q: Any, k: Any, v: Any) -> Any:
    return F.linear(x, torch.cat([q.weight, k.weight, v.weight]), torch.cat([q.bias, k.bias, v.bias])).chunk(3, -1)


@rewrite_pattern(training="eval")
def norm_after_convolution(x: Any, conv: Any = module_of(nn.Conv1d), norm: Any = module_of(nn.BatchNorm1d)) -> Any:
    return norm(conv(x))


@norm_after_convolution.replacement
def folded(x: Tensor, conv: Any, norm: Any) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = (conv.bias - norm.running_mean) * scale + norm.bias
    return F.conv1d(x, conv.weight * scale[:, None, None], bias)


def test_several_results_and_modules() -> None:
    model, x = Block(), torch.randn(2, 5, 4)
    for _ in range(3):
        model(x)
    model.eval()
    before, trained = model(x), copy.deepcopy(model).train()(x)
    rules = [RewriteRule(pattern=projections, replacement=joint), norm_after_convolution.rule()]
    apply_rules(model, rules, example_inputs=x)
    with torch.no_grad():
        assert all(torch.allclose(new, old, atol=1e-6) for new, old in zip(model.eval()(x), before, strict=True))
    ran: list[str] = []
    for name, child in model.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(x)
    assert not ran
    assert all(torch.allclose(new, old, atol=1e-6) for new, old in zip(model.train()(x), trained, strict=True))
    assert ran == ["conv", "norm"]  # in training, batch norm uses the statistics of the batch
    assert rules_from_json(rules_to_json(rules)) == rules


def test_as_many_results_as_the_pattern_has() -> None:
    rule = RewriteRule(pattern=projections, replacement=lambda x, q, k, v: (q(x), k(x)))
    with pytest.raises(PlanError, match="the replacement returned 2 results, and the pattern has 3"):
        apply_rules(Block(), rule, example_inputs=torch.randn(2, 5, 4))


def test_parameters_and_modules_of_the_replacement_belong_to_the_adapter() -> None:
    def gated(x: Tensor, site: Any) -> Tensor:
        gate = site.submodule("gate", lambda: nn.Linear(4, 4))
        return x * torch.sigmoid(gate(x)) * site.param("scale", (4,), 1.0)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.relu(x) - 1)

    model, x = Two(), torch.randn(2, 4)
    rule = RewriteRule(pattern=lambda x: F.relu(x), replacement=gated, equivalent=False)
    apply_rules(model, rule, example_inputs=x)
    tensors: Any = dict(model.named_parameters())
    names = {name.rpartition(".")[2] for name in tensors}
    assert names == {"gate_weight", "gate_bias", "scale", "gate_1_weight", "gate_1_bias", "scale_1"}
    own = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    expected = x
    for end, shift in (("", 1), ("_1", 0)):
        gate = F.linear(expected, own[f"gate{end}_weight"], own[f"gate{end}_bias"])
        expected = expected * torch.sigmoid(gate) * own[f"scale{end}"] - shift
    assert torch.allclose(model(x), expected)


def test_shapes_of_parameters_of_a_layer_that_is_one_operation() -> None:
    def sized(x: Tensor, weight: Tensor, bias: Tensor, match: Any) -> Tensor:
        shapes.append((match.shape("x"), match.shape("weight"), match.dtype("bias")))
        return F.gelu(F.linear(x, weight, bias))

    shapes: list[Any] = []
    rule = RewriteRule(pattern=lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)), replacement=sized)
    apply_rules(nn.Sequential(nn.Linear(4, 3), nn.GELU()), rule, example_inputs=torch.randn(2, 4))
    assert set(shapes) == {((2, 4), (3, 4), torch.float32)}
