"""Where RewriteRules go: across the borders of modules, with other rules, and what they leave as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, SurgeryWarning, activate, apply_rules, deactivate, maybe, module_of, plan_rules, remove
from surgery.rules import LoraRule, RewriteRule, SteerRule
from surgery.state.records import sites
from surgery.testing import Snapshot
from tests.support.tiny import bert


class Net(nn.Module):
    """A convolution and a norm in one Sequential, and a GELU in another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def norm_after_convolution(x: Any, conv: Any = module_of(nn.Conv2d), norm: Any = module_of(nn.BatchNorm2d)) -> Any:
    return norm(conv(x))


def folded(x: Tensor, conv: Any, norm: Any) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), (conv.bias - norm.running_mean) * scale + norm.bias)


def gelu(x: Any) -> Any:
    return F.gelu(x)


def written_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def gelu_of_linear(x: Any, weight: Any, bias: Any) -> Any:
    return F.gelu(F.linear(x, weight, bias))


def one_line(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x @ weight.mT + bias)


def attention(q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
    return maybe(q @ k.mT * scale + mask).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


FOLD = RewriteRule(pattern=norm_after_convolution, replacement=folded, training="eval")
GELU = RewriteRule(pattern=gelu, replacement=written_gelu)
JOINT = RewriteRule(pattern=gelu_of_linear, replacement=one_line)
LORA, STEER = LoraRule("intermediate.dense", rank=2), SteerRule("intermediate_act_fn", features=48)
FUSED = RewriteRule(pattern=attention, replacement=fused)


def places(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the sites with the paths that they inline."""
    return {path: site.applied[0].facts.get("inlined", ()) for path, _, site in sites(model)}


def test_children_of_a_sequential_are_inlined_in_its_parent_and_a_layer_alone_is_its_own_site() -> None:
    model, x = Net(), torch.randn(2, 3, 4, 4)
    for _ in range(3):
        model(x)
    model.eval()
    before, whole = model(x), Snapshot(model)
    apply_rules(model, [FOLD, GELU], example_inputs=x)
    assert places(model) == {"": ("body",), "head.1": ()}
    assert torch.allclose(model(x), before, atol=1e-6)
    ran: list[nn.Module] = []
    hooks = [child.register_forward_hook(lambda module, *_: ran.append(module)) for child in model.body]
    model(x)
    assert ran == [model.body[2]]
    for hook in hooks:
        hook.remove()
    remove(model)
    assert not whole.differences(model)
    assert torch.equal(model(x), before)


def test_an_activation_module_is_inlined_where_its_linear_is_called() -> None:
    model, example = bert()
    model.eval()
    before = model(**example)[0]
    apply_rules(model, JOINT, example_inputs=example)
    assert places(model) == {f"bert.encoder.layer.{i}.intermediate": ("intermediate_act_fn",) for i in range(2)}
    assert torch.allclose(model(**example)[0], before, atol=1e-6)
    remove(model)
    assert torch.equal(model(**example)[0], before)


def test_targets_are_the_modules_in_which_the_rule_searches() -> None:
    model, example = bert()
    apply_rules(model, JOINT.replace(targets="encoder.layer.1"), example_inputs=example)
    assert list(places(model)) == ["bert.encoder.layer.1.intermediate"]
    remove(model)
    apply_rules(model, JOINT.replace(exclude="layer.1", expect=1), example_inputs=example)
    assert list(places(model)) == ["bert.encoder.layer.0.intermediate"]
    remove(model)
    apply_rules(model, JOINT.replace(layers=1, expect=1), example_inputs=example)
    assert list(places(model)) == ["bert.encoder.layer.1.intermediate"]
    remove(model)
    for rule, text in {
        JOINT.replace(targets="pooler"): "only outside of its targets",
        JOINT.replace(expect=3): "expects 3 sites and finds 2",
    }.items():
        with pytest.raises(PlanError, match=text):
            apply_rules(model, rule, example_inputs=example)


def test_a_pattern_that_is_not_there_names_the_nearest_miss() -> None:
    model, example = bert()
    rule = RewriteRule(pattern=lambda x: F.gelu(x) * 2, replacement=lambda x: x)
    with pytest.raises(PlanError, match="(?s)does not find its pattern.*nearest miss.*intermediate_act_fn") as raised:
        apply_rules(model, rule, example_inputs=example)
    assert "graph_of" in str(raised.value) and not list(sites(model))
    with pytest.raises(PlanError, match="needs example_inputs"):
        apply_rules(model, rule)


def test_a_hook_on_a_child_forbids_inlining_it() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 4, 4)
    hook = model.body.register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match="body can't be inlined: it has forward hooks"):
        apply_rules(model, FOLD, example_inputs=x)
    hook.remove()
    apply_rules(model, FOLD, example_inputs=x)
    hook = model.body.register_forward_hook(lambda *_: None)  # the graph has no call that would run it
    with pytest.raises(Exception, match="it has forward hooks, which only a call of it runs"):
        model(x)
    hook.remove()
    model(x)


def test_modules_with_rules_stay_in_the_call() -> None:
    model, example = bert()
    apply_rules(model, LoraRule("intermediate.dense", rank=2))
    with pytest.raises(PlanError, match="does not call dense, and it has rules of its own"):
        apply_rules(model, JOINT, adapter="rewritten", example_inputs=example)
    remove(model)
    apply_rules(model, JOINT, adapter="rewritten", example_inputs=example)
    for rule, why in {LORA: "replaces the call of the module", STEER: "without a call of it"}.items():
        with pytest.raises(PlanError, match=f"(?s)would have no effect.*{why}"):
            apply_rules(model, rule, adapter="b", example_inputs=example)
    apply_rules(model, LoraRule(["query", "output.dense"], rank=2), adapter="lora")
    model(**example)


def test_of_two_rules_the_first_takes_an_operation() -> None:
    model, example = bert()
    other = RewriteRule(pattern=lambda x: x.softmax(-1), replacement=lambda x: x.softmax(-1) * 1)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(PlanError, match=r"leaves a match as it is: RewriteRule\(attention→fused\) replaces softmax"):
        apply_rules(model, [FUSED, other], example_inputs=example)
    with pytest.warns(SurgeryWarning, match="in training: the replacement leaves out dropout, a dropout"):
        apply_rules(model, [FUSED, GELU], example_inputs=example)


def test_a_rule_inside_an_inlined_child_joins_the_site() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.inner = nn.Linear(4, 4), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.linear(x))

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(F.gelu(x))

    model, x = Block(), torch.randn(2, 4)
    before = model(x)
    sigmoid = RewriteRule(pattern=lambda x: torch.sigmoid(x), replacement=lambda x: 1 / (1 + torch.exp(-x)))
    apply_rules(model, [JOINT, sigmoid], example_inputs=x)
    assert places(model) == {"": ("inner",)} and torch.allclose(model(x), before)
    remove(model)
    apply_rules(model, JOINT, adapter="one", example_inputs=x)
    apply_rules(model, sigmoid, adapter="two", example_inputs=x)
    assert places(model) == {"": ("inner",)} and torch.allclose(model(x), before)
    remove(model)
    assert torch.equal(model(x), before)


def between(x: Tensor) -> Tensor:
    doubled = x * 2
    result = doubled + 1
    doubled.add_(3)
    return result.relu() + doubled


def outside(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled += 1
    return doubled.relu() + doubled


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x + 1).relu()


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        doubled = x * 2
        doubled += 1
        return doubled.relu()


def inside(x: Tensor) -> Tensor:
    doubled = x * 2
    doubled += 1
    return doubled.relu()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (between, "add_ writes in place to mul between the operations of the match"),
        (outside, "add_ writes in place to mul, which is used outside of the match"),
        (autocast, "under torch.autocast of its own"),
        (inside, ""),
        (without_gradients, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_writes_in_place_and_regions(function: Callable[[Tensor], Tensor], why: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    pattern = (lambda x: torch.relu(x * 2 + 1)) if not why else (lambda x: torch.relu(x + 1))
    replacement = (lambda x: torch.relu(1 + 2 * x)) if not why else (lambda x: torch.relu(1 + x))
    model, x = Model(), torch.randn(5)
    before, rule = model(x), RewriteRule(pattern=pattern, replacement=replacement)
    if why:
        assert why in str(plan_rules(model, rule, example_inputs=x))
        return
    apply_rules(model, rule, example_inputs=x)
    assert torch.equal(model(x), before)


def test_a_warning_of_training_comes_once_for_alike_sites() -> None:
    model, example = bert()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.warns(SurgeryWarning, match="in training") as caught:
        apply_rules(model, FUSED, example_inputs=example)
        model.train()(**example)
        with torch.no_grad():
            model(**example)
    assert len(caught) == 1


def test_a_sequential_with_nothing_around_it_is_the_site_unless_it_would_get_tensors() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(2, 4)
    whole, before = Snapshot(model), model(x)
    apply_rules(model, JOINT, example_inputs=x)
    assert places(model) == {"": ()} and len(model) == 3 and [*model] == [model[0], model[1], model[2]]
    assert torch.allclose(model(x), before) and torch.allclose(copy.deepcopy(model)(x), before)
    with pytest.raises(PlanError, match="iterates over its children"):
        apply_rules(model, LoraRule("", rank=2), adapter="lora")
    deactivate(model)
    assert torch.equal(model(x), before)
    activate(model, "default")
    remove(model)
    assert not whole.differences(model)

    def scaled(x: Tensor, weight: Tensor, bias: Tensor, site: Any) -> Tensor:
        return one_line(x, weight, bias) * site.param("scale", (4,), 1.0)

    with pytest.raises(PlanError, match="iterates over its children, adapters included"):
        apply_rules(model, RewriteRule(pattern=gelu_of_linear, replacement=scaled), example_inputs=x)
