"""Rules that look into functions from registries, in every kind of call; and operations that matches pass over."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    PlanError,
    Rule,
    Structure,
    SurgeryError,
    SurgeryWarning,
    activate,
    apply_rules,
    deactivate,
    load_adapter,
    module_of,
    plan_rules,
    remove,
    rename_adapter,
    rule,
    save_adapter,
    show,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SOFTMAX = Structure(lambda scores: torch.softmax(scores, -1))
WEIGHTED = Structure(lambda scores, v: torch.softmax(scores, -1) @ v)


@rule("test-through-temper")
class TemperRule(Rule):
    factor: float = 0.5

    def rewrite(self, site: Any) -> None:
        for match in site.find(SOFTMAX, leaves=False):
            scores = match.bindings["scores"]
            site.replace(scores, scores * self.factor)


@rule("test-through-learned")
class LearnedRule(Rule):
    """A trained temperature for each head."""

    def rewrite(self, site: Any) -> None:
        heads = site.module.config.num_attention_heads
        for match in site.find(SOFTMAX, leaves=False):
            scores = match.bindings["scores"]
            site.replace(scores, scores * site.param("temper", (heads, 1, 1), 0.5))


def bert() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = FAMILIES["bert"].make().eval()
    model.set_attn_implementation("eager")
    for layer in model.bert.encoder.layer:
        nn.init.normal_(layer.attention.self.query.weight)  # otherwise all attention weights are nearly equal
        nn.init.normal_(layer.attention.self.key.weight)
    return model, FAMILIES["bert"].inputs()


def edit_attention(factor: Any) -> Callable[..., Any]:
    """Returns transformers' own attention function, edited by hand."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, dropout: float = 0.0, **_: Any
    ):
        scaling = query.size(-1) ** -0.5 if scaling is None else scaling
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        if mask is not None:
            scores = scores + mask[:, :, :, : key.shape[-2]]
        weights = F.softmax(scores * factor, dim=-1)
        weights = F.dropout(weights, p=dropout, training=module.training)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    return attend


@contextmanager
def by_hand(function: Any) -> Iterator[None]:
    import transformers.models.bert.modeling_bert as modeling

    before = modeling.eager_attention_forward
    modeling.eager_attention_forward = function
    try:
        yield
    finally:
        modeling.eager_attention_forward = before


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_hand_edited_attention_gives(training: bool, masked: bool, dtype: torch.dtype) -> None:
    model, inputs = bert()
    model = model.to(dtype)
    before = Snapshot(model)
    reference = copy.deepcopy(model)
    apply_rules(model, TemperRule("attention.self"), example_inputs=inputs)
    if masked:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        inputs["attention_mask"][:, -2:] = 0
    model.train(training)
    reference.train(training)
    torch.manual_seed(1)
    output = model(**inputs)[0]
    state = torch.get_rng_state()
    with by_hand(edit_attention(0.5)):
        torch.manual_seed(1)
        expected = reference(**inputs)[0]
    assert torch.equal(output, expected) and torch.equal(torch.get_rng_state(), state)
    output.float().sum().backward()
    expected.float().sum().backward()
    gradients = dict(reference.named_parameters())
    assert all(
        (p.grad is None) == (gradients[name].grad is None)
        and (p.grad is None or torch.equal(p.grad, gradients[name].grad))
        for name, p in model.named_parameters()
    )
    model.zero_grad()
    remove(model.eval())
    assert before.differences(model) == []


def test_a_trained_number_inside_an_attention() -> None:
    model, inputs = bert()
    apply_rules(model, LearnedRule("attention.self"), example_inputs=inputs)
    factor = torch.full((model.config.num_attention_heads, 1, 1), 0.5, requires_grad=True)
    loss = model(**inputs)[0].square().sum()
    loss.backward()
    with by_hand(edit_attention(factor)):
        expected = copy.deepcopy(model)
        remove(expected)
        expected(**inputs)[0].square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("temper")]
    torch.testing.assert_close(sum(gradients), factor.grad)
    assert_reversible(bert()[0], [LearnedRule("attention.self")], example_inputs=inputs)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # transformers' own
def test_compile_export_copies_and_pickles() -> None:
    model, inputs = bert()
    apply_rules(model, TemperRule("attention.self"), example_inputs=inputs)
    expected = model(**inputs)[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs)[0], expected)
    for strict in (True, False):
        program = torch.export.export(model, (), inputs, strict=strict)
        torch.testing.assert_close(program.module()(**inputs)[0], expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs)[0], expected)
    assert "softmax" in show(model, "bert.encoder.layer.0.attention.self")


def test_two_rules_and_one_that_goes_through_nothing() -> None:
    """Two adapters with rules inside the forward, one also with LoRA in a child, are removed one after the other."""
    model, inputs = bert()
    before = model(**inputs)[0]
    with by_hand(edit_attention(0.25)):
        expected = model(**inputs)[0]
    apply_rules(model, TemperRule("attention.self"), adapter="a", example_inputs=inputs)
    apply_rules(model, [LoraRule("query", rank=2), TemperRule("attention.self")], adapter="b", example_inputs=inputs)
    torch.testing.assert_close(model(**inputs)[0], expected)
    with by_hand(edit_attention(0.5)):
        plain = copy.deepcopy(model)
        remove(plain)
        once = plain(**inputs)[0]
    remove(model, "a")
    assert torch.equal(model(**inputs)[0], once)
    remove(model)
    assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "qwen3", "whisper"])
def test_families_that_take_their_attention_from_a_registry(family: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = FAMILIES[family].make().eval()
    model.set_attn_implementation("eager")
    inputs = FAMILIES[family].inputs()
    before, snapshot = model(**inputs)[0], Snapshot(model)
    names = [
        name for name, module in model.named_modules() if type(module).__name__.endswith(("Attention", "SelfAttention"))
    ]
    names = [name for name in names if plan_rules(model, TemperRule(name, factor=0.0), example_inputs=inputs).steps]
    apply_rules(model, [TemperRule(name, factor=1.0) for name in names], example_inputs=inputs)
    assert names and torch.equal(model(**inputs)[0], before)  # times one
    remove(model)
    apply_rules(model, [TemperRule(name, factor=0.5) for name in names], example_inputs=inputs)
    live = model(**inputs)[0]
    remove(model)
    assert snapshot.differences(model) == []
    for name in names:
        module = model.get_submodule(name)
        module.scaling = getattr(module, "scaling", None) and module.scaling * 0.5
    if all(model.get_submodule(name).scaling is not None for name in names):
        torch.testing.assert_close(live, model(**inputs)[0], rtol=1e-4, atol=1e-5)


# Conflicts ------------------------------------------------------------------------------------------------------


@rule("test-through-around")
class AroundRule(Rule):
    def rewrite(self, site: Any) -> None:
        site.around(doubled)


def doubled() -> Any:
    def attend(inner: Any, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(module, query * 2, *args, **kwargs)

    return attend


@pytest.mark.parametrize("around_first", [False, True])
def test_a_function_around_one_that_is_gone_through(around_first: bool) -> None:
    model, inputs = bert()
    first, second = AroundRule("attention.self"), TemperRule("attention.self")
    if not around_first:
        first, second = second, first
    apply_rules(model, first, adapter="a", example_inputs=inputs)
    live, snapshot = model(**inputs)[0], Snapshot(model)
    with pytest.raises(SurgeryError, match="another rule goes through them"):
        apply_rules(model, second, adapter="b", example_inputs=inputs)
    assert snapshot.differences(model) == [] and torch.equal(model(**inputs)[0], live)


def test_a_rule_that_looks_first_without() -> None:
    @rule("test-through-late")
    class LateRule(Rule):
        def rewrite(self, site: Any) -> None:
            site.find(Structure(lambda x: x.transpose(1, 2)))
            for match in site.find(SOFTMAX, leaves=False):
                site.replace(match.root, match.root * 2)

    model, inputs = bert()
    with pytest.raises(PlanError, match="leaves=False to the first site.find"):
        apply_rules(model, LateRule("attention.self"), example_inputs=inputs)


def test_a_rule_that_does_not_go_through_sees_what_it_saw() -> None:
    """Its structures are not found in functions from registries, even if another adapter's rule looks into them."""
    counts: list[int] = []

    @rule("test-through-not")
    class NotRule(Rule):
        def rewrite(self, site: Any) -> Any:
            counts.append(len(site.find(Structure(lambda q, k: q @ k))))
            return site.with_hidden(site.hidden * 2)

    model, inputs = bert()
    apply_rules(model, TemperRule("attention.self"), adapter="a", example_inputs=inputs)
    apply_rules(model, NotRule("attention.self"), adapter="b", example_inputs=inputs)
    model(**inputs)
    assert set(counts) == {0}


def test_the_error_says_where_a_structure_is() -> None:
    @rule("test-through-without")
    class WithoutRule(Rule):
        def rewrite(self, site: Any) -> None:
            for match in site.find(SOFTMAX):
                site.replace(match.root, match.root * 2)

    model, inputs = bert()
    fix = str(plan_rules(model, WithoutRule("attention.self"), example_inputs=inputs).problems[0].fix)
    assert fix.endswith("as one operation, and that function contains it: look into it with site.find(…, leaves=False)")
    fix = str(plan_rules(model, WithoutRule("encoder.layer.0"), example_inputs=inputs).problems[0].fix)
    assert "its 'attention.self' takes eager_attention_forward" in fix and "target that module, and look into it" in fix


# Operations that a match passes over ------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT).double(), -1).to(q.dtype)
        return self.drop(weights) @ v


ATTENTION = Structure(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)
QKV: Any = tuple(torch.randn(2, 2, 5, 4) for _ in range(3))


@rule("test-passed-lost")
class LostRule(Rule):
    def rewrite(self, site: Any) -> None:
        (match,) = site.find(ATTENTION)
        q, k, v = (match.bindings[name] for name in "qkv")
        site.replace(match.root, F.scaled_dot_product_attention(q, k, v, scale=1.0))


@rule("test-passed-asked")
class AskedRule(Rule):
    """Applies the dropout of the match to the new value."""

    def rewrite(self, site: Any) -> None:
        (match,) = site.find(ATTENTION)
        assert [site.node_of(value).name for value in match.passed] == ["double", "to", "drop"]
        q, k, v = (match.bindings[name] for name in "qkv")
        drop = match.passed[-1]
        weights = torch.softmax(2 * (q @ k.mT), -1)
        site.replace(match.root, site.again(drop, {site.node_of(drop).args[0]: weights}) @ v)


@rule("test-passed-kept")
class KeptRule(Rule):
    """Keeps the operations inside the match."""

    def rewrite(self, site: Any) -> None:
        (match,) = site.find(ATTENTION)
        site.replace(match.root, match.root * 2)


def test_a_dropout_that_a_rewrite_leaves_out_is_told() -> None:
    model = Dropping()
    with pytest.warns(SurgeryWarning, match="in the place of matmul_1 leaves out drop, a dropout inside of the match"):
        apply_rules(model, LostRule(Dropping), example_inputs=QKV)
    torch.testing.assert_close(model(*QKV), F.scaled_dot_product_attention(*QKV, scale=1.0))
    model.train()(*QKV)  # the warning does not come again
    (warning,) = plan_rules(Dropping(), LostRule(Dropping), example_inputs=QKV).warnings
    assert warning.startswith("LostRule at the model itself: what it puts") and warning.endswith(
        "read the match's passed"
    )


def test_what_is_asked_for_or_goes_on_is_not_told() -> None:
    for checked_rule in (AskedRule(Dropping), KeptRule(Dropping)):
        model = Dropping()
        apply_rules(model, checked_rule, example_inputs=QKV)
        model.train()
        torch.manual_seed(0)
        output = model(*QKV)
        remove(model)
        torch.manual_seed(0)
        q, k, v = QKV
        factor = 2 if isinstance(checked_rule, AskedRule) else 1
        scores = q @ k.mT
        weights = torch.softmax(scores * 2, -1) if factor == 2 else torch.softmax(scores.double(), -1).float()
        expected = F.dropout(weights, 0.5) @ v
        torch.testing.assert_close(output, expected if factor == 2 else expected * 2)
    assert (
        plan_rules(Dropping(0.0), LostRule(Dropping), example_inputs=QKV).warnings == []
    )  # a dropout with p = 0 does not matter


def test_a_dropout_that_is_there_in_training_alone_is_told_when_it_is_made_ready() -> None:
    class Trained(Dropping):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.softmax(q @ k.mT, -1)
            return F.dropout(weights, 0.5 if self.training else 0.0) @ v

    model = Trained()
    with pytest.warns(SurgeryWarning, match="leaves out dropout"):
        apply_rules(model, LostRule(Trained), example_inputs=QKV)
    with warnings.catch_warnings(record=True) as later_warnings:
        warnings.simplefilter("always")
        model.train()(*QKV)
        model(*(x.clone().requires_grad_() for x in QKV))
        model(*(x[:1] for x in QKV))
    assert later_warnings == []


def test_a_detach_is_told_as_well() -> None:
    class Stopped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT, -1).detach() @ v

    (warning,) = plan_rules(Stopped(), LostRule(Stopped), example_inputs=QKV).warnings
    assert "leaves out detach, a detach" in warning


def test_passed_on_graphs() -> None:
    from surgery import trace

    (match,) = ATTENTION.find(trace(Dropping(), QKV))
    assert [str(node) for node in match.passed] == ["double", "to", "drop"]


def test_switched_renamed_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = bert()
    base = model(**inputs)[0]
    apply_rules(model, LearnedRule("attention.self"), example_inputs=inputs)
    expected = model(**inputs)[0]
    deactivate(model)
    assert torch.equal(model(**inputs)[0], base)
    activate(model, "default")
    rename_adapter(model, "default", "other")
    assert torch.equal(model(**inputs)[0], expected)
    save_adapter(model, tmp_path / "adapter", adapter="other")
    remove(model)
    assert torch.equal(model(**inputs)[0], base)
    load_adapter(model, tmp_path / "adapter", example_inputs=inputs)
    assert torch.equal(model(**inputs)[0], expected)


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm followed by an activation, like timm's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


def test_a_norm_with_an_activation_is_left_alone() -> None:
    @rule("test-norm-folded")
    class NormRule(Rule):
        """Removes norms of exactly this class."""

        def rewrite(self, site: Any) -> None:
            for match in site.find(Structure(lambda x: module_of(nn.BatchNorm2d, x))):
                site.replace(match.root, match.bindings["x"])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(3), BatchNormAct2d(3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.act(self.norm(x)) * scale

    block, x = Block().eval(), torch.randn(2, 3, 4, 4)
    apply_rules(block, NormRule(Block), example_inputs=x)
    assert torch.equal(block(x), block.act(x))
    (problem,) = plan_rules(Only(BatchNormAct2d(3)), NormRule(Only), example_inputs=x).problems
    assert "act is a BatchNormAct2d, a subclass of BatchNorm2d" in str(problem.why)


class Only(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.act(x) * scale
