"""RewriteRule against models in which the operations were written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import RuleError, apply_rules, maybe, remove, rules_from_json, rules_to_json
from surgery.rules import RewriteRule
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
    apply_rules(model, RewriteRule(pattern=masked, replacement=masked_fused), example_inputs=example)
    assert torch.allclose(model(**example)[0], before, atol=1e-6) and not torch.equal(model(**example)[0], before)
    remove(model)
    assert torch.equal(model(**example)[0], before)


def test_the_rule_is_data() -> None:
    rule = RewriteRule(pattern=scores, replacement=fused, training="eval")
    assert rule.pattern == "tests.rules.test_rewrite.scores" and rules_from_json(rules_to_json([rule])) == [rule]
    with pytest.raises(RuleError, match="can't be written"):
        rules_to_json([RewriteRule(pattern=lambda x: x.relu(), replacement=fused)])


def test_bad_functions() -> None:
    with pytest.raises(RuleError, match="the replacement .* has the parameter y"):
        RewriteRule(pattern=lambda x: x.relu(), replacement=lambda x, y: x)
    with pytest.raises(RuleError, match="is not a pattern"):
        RewriteRule(pattern=lambda x: 1, replacement=lambda x: x)
