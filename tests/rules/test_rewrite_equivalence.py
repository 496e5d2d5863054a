"""The check of RewriteRules: outputs and gradients of the rewritten module beside those of its own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import RuleError, SurgeryError, apply_rules, remove
from surgery.rules import RewriteRule
from surgery.state.records import sites
from surgery.testing import Snapshot
from tests.support.tiny import bert


class Layer(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(size, size), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.linear(x)))


def gelu(x: Any) -> Any:
    return F.gelu(x)


def exact_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def cut_gradient(x: Tensor) -> Tensor:
    return F.gelu(x).detach() + 0 * x


def only_two_rows(x: Tensor) -> Tensor:
    return torch.cat([F.gelu(x[:2]), x[2:]])


def only_five_positions(x: Tensor) -> Tensor:
    return F.gelu(x) * (1 + F.pad(x[:, 4:], (0, 0, 4, 0)).new_zeros(()) + (5 - x.shape[1]))


def rule(replacement: Any, **fields: Any) -> RewriteRule:
    return RewriteRule(pattern=gelu, replacement=replacement, **fields)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6, 257])
def test_rounding_is_allowed(dtype: torch.dtype, size: int) -> None:
    model = Layer(size).to(dtype)
    apply_rules(model, rule(exact_gelu), example_inputs=torch.randn(2, 5, size, dtype=dtype))
    assert len(list(sites(model))) == 1


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        (tanh_gelu, "on the example\n.*the output differs"),
        (lambda x: F.gelu(x) + 1e-4 * x, "the output differs by up to .*, and .* is allowed: at .* it is .* and was"),
        (cut_gradient, "the gradient of input 0 differs"),
        (only_two_rows, r"on [345] rows"),
        (only_five_positions, r"on length [234678]\b"),
    ],
    ids=["tanh", "term", "gradient", "rows", "length"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_results_are_an_error(replacement: Any, words: str, dtype: torch.dtype) -> None:
    model, x = Layer().to(dtype), torch.randn(2, 5, 6, dtype=dtype)
    whole, before = Snapshot(model), model(x)
    with pytest.raises(SurgeryError, match=rf"(?s)changes what the module computes.*{words}"):
        apply_rules(model, rule(replacement), example_inputs=x)
    assert not whole.differences(model) and torch.equal(model(x), before)
    apply_rules(model, rule(replacement, equivalent=False), example_inputs=x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_hides_nothing(dtype: torch.dtype) -> None:
    model, x = Layer().to(dtype), torch.randn(2, 5, 6, dtype=dtype)
    with pytest.raises(SurgeryError, match="in a copy in float32"):
        apply_rules(model, rule(tanh_gelu), example_inputs=x)
    assert not list(sites(model))
    apply_rules(model, rule(tanh_gelu, tolerance=0.01), example_inputs=x)
    without_tensors = nn.Sequential(nn.Linear(6, 6), nn.GELU()).to(dtype)
    with pytest.raises(SurgeryError, match="in a copy in float32"):
        apply_rules(without_tensors, rule(tanh_gelu), example_inputs=x)


def test_bits_may_be_asked_for_and_a_tolerance_given() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(SurgeryError, match="the rule asks for the same bits"):
        apply_rules(Layer(), rule(exact_gelu, exact=True), example_inputs=x)
    apply_rules(Layer(), rule(lambda x: F.gelu(x, approximate="none"), exact=True), example_inputs=x)
    apply_rules(Layer(), rule(tanh_gelu, tolerance=0.01), example_inputs=x)
    with pytest.raises(SurgeryError, match="and 1e-0[0-9] is allowed|and .*e-0[0-9] is allowed"):
        apply_rules(Layer(), rule(tanh_gelu, tolerance=1e-7), example_inputs=x)
    for fields in ({"tolerance": -1}, {"exact": 1}, {"exact": True, "tolerance": 0.1}, {"equivalent": None}):
        with pytest.raises(RuleError):
            rule(gelu, **fields)


def test_training_is_compared_where_the_forward_is_deterministic() -> None:
    class Dropped(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.gelu(self.linear(x)), 0.5, self.training)

    def wrong_in_training(x: Tensor, site: Any) -> Tensor:
        return F.gelu(x) * 2 if site.training else F.gelu(x)

    x = torch.randn(2, 5, 6)
    with pytest.raises(SurgeryError, match="on the example, in training"):
        apply_rules(Layer(), rule(wrong_in_training), example_inputs=x)
    apply_rules(Dropped(), rule(exact_gelu), example_inputs=x)


def test_another_shape_is_an_error() -> None:
    model, x = Layer(), torch.randn(2, 5, 6)
    with pytest.raises(SurgeryError, match=r"\(1, 2, 5, 6\) and was torch.float32 \(2, 5, 6\)"):
        apply_rules(model, rule(lambda x: F.gelu(x)[None]), example_inputs=x)
    assert not list(sites(model))


def test_running_statistics_and_random_states_stay() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.norm(x))

    model, x = Normed(), torch.randn(4, 6)
    whole, state = Snapshot(model), torch.get_rng_state()
    apply_rules(model, rule(exact_gelu), example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [line for line in whole.differences(model) if "norm" in line and "class" not in line]


def test_real_attentions_agree_in_all_sizes() -> None:
    model, example = bert()
    apply_rules(model, rule(exact_gelu), example_inputs=example)
    assert len(list(sites(model))) == 2


class WithoutGradients(nn.Module):
    """It writes to what the backward of exp needs, so autograd refuses its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        z = y * 2
        y.add_(1)
        return F.gelu(z)


def test_outputs_alone_are_compared_where_autograd_refuses_the_gradients() -> None:
    model, x = WithoutGradients(), torch.randn(3, 4)
    before = model(x)
    apply_rules(model, rule(exact_gelu), example_inputs=x)
    assert torch.allclose(model(x), before, atol=1e-6)
    with pytest.raises(SurgeryError, match="the output differs"):
        apply_rules(WithoutGradients(), rule(tanh_gelu), example_inputs=x)


def test_calls_in_other_sizes_leave_no_trace_in_the_model() -> None:
    """A forward may change its model at a short text, as BigBird's does."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other, self.kind = Layer(), nn.Linear(6, 6), "sparse"

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] < 6:
                self.kind, self.other = "full", nn.Linear(6, 6)
            return self.inner(self.other(x))

    model, x = Sparse(), torch.randn(2, 6, 6)
    snapshot = Snapshot(model)
    for _ in range(8):
        apply_rules(model, rule(exact_gelu, targets="inner"), example_inputs=x)
        remove(model)
        assert model.kind == "sparse" and not snapshot.differences(model)
