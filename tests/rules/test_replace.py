"""ReplaceRule against a model in which the module was replaced by hand: bits are equal for any forward."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import surgery
from surgery import (
    PlanError,
    RuleError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    load_adapter,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    save_adapter,
    show,
)
from surgery.authoring.module_skeleton import Skeleton
from surgery.authoring.skeleton_parts import named_tensors
from surgery.rules import BottleneckRule, LoraRule, ReplaceRule
from surgery.testing import Snapshot
from tests.support import foreign
from tests.support.foreign import Host
from tests.support.sampling import sample

SIZED: dict[str, type[nn.Module]] = {
    name.lower(): getattr(foreign, name)
    for name in ("Experts", "Recurrent", "Attention", "Shared", "Normal", "Deciding", "Looking")
}
WHOLE = sorted(set(SIZED) - {"looking", "experts"})  # torch.compile breaks the others' graphs in a plain model, too
X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def host() -> Any:
    torch.manual_seed(0)
    return Host(nn.Linear(4, 4))


def pair(name: str, opaque: bool | None = None, **options: Any) -> tuple[Any, Any, ReplaceRule]:
    """A model with the rule, and a model with the same replacement by hand."""
    by = f"tests.support.foreign.{SIZED[name].__name__}"
    model, rule = host(), ReplaceRule("inner", by=by, kwargs={"size": 4}, opaque=opaque)
    apply_rules(model, rule, **options)
    by_hand = host()
    by_hand.inner = rule.make()
    copy_tensors(model, by_hand)
    return model, by_hand, rule


def copy_tensors(model: Any, by_hand: Any) -> None:
    """The adapter's tensors into the module that was put in by hand."""
    words = Skeleton.of(by_hand.inner).words
    params, own = adapter_state_dict(model), named_tensors(by_hand.inner)
    assert list(params) == [f"inner.adapters.{word}" for word in words]
    with torch.no_grad():
        for word, inner in words.items():
            own[inner].copy_(params[f"inner.adapters.{word}"])


def alike(model: Any, by_hand: Any) -> None:
    words, own = Skeleton.of(by_hand.inner).words, named_tensors(by_hand.inner)
    for word, inner in words.items():
        actual = getattr(model.inner.adapters.default, word)
        assert torch.equal(actual, own[inner]), word


@pytest.mark.parametrize("name", SIZED)
def test_it_computes_what_the_module_does(name: str) -> None:
    model, by_hand, _ = pair(name)
    for training in (True, False, True):
        model.train(training)
        by_hand.train(training)
        for x in (X, -X, torch.randn(2, 7, 4)):
            assert torch.equal(model(x), by_hand(x))
        alike(model, by_hand)


@pytest.mark.parametrize("name", SIZED)
def test_it_trains_as_the_module_does(name: str) -> None:
    model, by_hand, _ = pair(name, freeze=False)
    model.inner.requires_grad_(True)
    optimizers = []
    for item in (model, by_hand):
        trained = {id(p): p for p in item.parameters()}
        own = {id(p) for p in (model.inner._parameters if item is model else {}).values()}
        optimizers.append(torch.optim.AdamW([p for key, p in trained.items() if key not in own], lr=0.05))
    for _ in range(4):
        for item, optimizer in zip((model, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            item(X).square().sum().backward()
            optimizer.step()
    alike(model, by_hand)
    assert torch.equal(model.first.weight, by_hand.first.weight)
    assert torch.equal(model.eval()(X), by_hand.eval()(X))


@pytest.mark.parametrize("name", SIZED)
def test_it_starts_as_torch_makes_it_and_planning_draws_nothing(name: str) -> None:
    rule = ReplaceRule("inner", by=SIZED[name], kwargs={"size": 4})
    model = host()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert plan_rules(model, rule)
    assert torch.equal(torch.get_rng_state(), state)
    apply_rules(model, rule)
    torch.manual_seed(7)
    module = SIZED[name](4)
    words, own = Skeleton.of(module).words, named_tensors(module)
    assert all(torch.equal(getattr(model.inner.adapters.default, w), own[n]) for w, n in words.items())


@pytest.mark.parametrize("name", SIZED)
def test_it_goes_and_is_copied_and_written(name: str, tmp_path: Path) -> None:
    model = host()
    before = Snapshot(model)
    rule = ReplaceRule("inner", by=SIZED[name], kwargs={"size": 4})
    assert rules_from_json(rules_to_json([rule])) == [rule]
    apply_rules(model, rule)
    model(X)
    expected = model.eval()(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), expected)
        assert torch.equal(remove(other)(X), host().eval()(X))
    save_adapter(model, tmp_path)
    with pytest.raises(SurgeryError, match="trust"):
        load_adapter(host(), tmp_path)
    load_adapter(again := host(), tmp_path, trust=True)
    assert torch.equal(again.eval()(X), expected)
    surgery.copy_adapter(model, "default", "other")
    assert torch.equal(surgery.activate(model, "other")(X), expected)
    remove(model.train())
    assert not before.differences(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sample(WHOLE, 4))
def test_it_compiles_whole(name: str, training: bool) -> None:
    torch._dynamo.reset()
    model, by_hand, _ = pair(name, freeze=True)
    model.train(training)
    by_hand.train(training)
    for x in (X, torch.randn(2, 5, 4)):
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), by_hand(x))
    alike(model, by_hand)


@pytest.mark.parametrize("name", sample(sorted(set(SIZED) - set(WHOLE)), 4))
def test_what_breaks_a_graph_breaks_it_as_in_a_plain_model(name: str) -> None:
    torch._dynamo.reset()
    model, by_hand, _ = pair(name, freeze=True)
    with torch.no_grad():  # at a break Dynamo warns of inner tensors' .grad
        compiled: Any = torch.compile(model.eval(), backend="eager")
        assert torch.equal(compiled(X), by_hand.eval()(X)) and torch.equal(compiled(-X), by_hand(-X))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", sample([*WHOLE, "experts"], 3))
def test_it_is_exported(name: str, strict: bool) -> None:
    model, by_hand, _ = pair(name)
    program = torch.export.export(model.eval(), (X,), strict=strict)
    assert torch.equal(program.module()(X), by_hand.eval()(X))


@pytest.mark.parametrize("name", sample(["normal", "recurrent", "shared", "deciding"], 4))
def test_it_goes_into_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, _, _ = pair(name)
    surgery.export_onnx(model.eval(), tmp_path / "a.onnx", X, adapters="constant")  # compared there with the model


@pytest.mark.parametrize("name", SIZED)
def test_beside_half_precision_it_computes_in_its_own(name: str) -> None:
    model, by_hand = host().bfloat16(), host().bfloat16()
    apply_rules(model, ReplaceRule("inner", by=SIZED[name], kwargs={"size": 4}))
    by_hand.inner = SIZED[name](4)
    copy_tensors(model, by_hand)
    assert {t.dtype for t in adapter_state_dict(model).values() if t.is_floating_point()} == {torch.float32}
    x = X.bfloat16()
    inner = by_hand.inner(torch.tanh(by_hand.first(x)).float()).bfloat16()
    assert torch.equal(model(x), by_hand.last(inner))


def test_straight_code_is_recorded_and_the_rest_called() -> None:
    for by, recorded in [(nn.SiLU, True), (foreign.Shared, False), (nn.BatchNorm1d, False)]:
        kwargs = {"size": 4} if by is foreign.Shared else {"num_features": 4} if by is nn.BatchNorm1d else {}
        model = apply_rules(host(), ReplaceRule("inner", by=by, kwargs=kwargs))
        assert (f"{by.__name__}({{" in show(model, "inner", generated=True)) is not recorded
    for opaque in (True, False):
        model = apply_rules(host(), ReplaceRule("inner", by=nn.SiLU, opaque=opaque))
        assert ("SiLU({" in show(model, "inner", generated=True)) is opaque


def test_equal_sites_share_their_code() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    apply_rules(model, ReplaceRule(nn.Linear, by=foreign.Recurrent, kwargs={"size": 4}))
    assert len({type(module) for module in model}) == 1
    drawn = [tensor for key, tensor in adapter_state_dict(model).items() if key.endswith("inner_weight")]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    other = apply_rules(nn.Linear(4, 4), ReplaceRule(nn.Linear, by=foreign.Recurrent, kwargs={"size": 5}))
    assert type(other) is not type(model[0])


def test_what_differs_in_a_setting_is_another_code() -> None:
    x = torch.randn(3, 4)
    for slope in (0.1, 0.5):
        model = apply_rules(
            nn.Sequential(nn.ReLU()), ReplaceRule("0", by=nn.LeakyReLU, kwargs={"negative_slope": slope}, opaque=True)
        )
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(model(x), nn.functional.leaky_relu(x, slope)) and torch.equal(again(x), model(x))


def test_classes_without_a_name_and_functions_stay_what_they_are() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, _ = x.chunk(2, -1)
            return torch.cat([a, a], -1)

    for by in (Local, lambda: Local()):
        rule = ReplaceRule("inner", by=by)
        model = apply_rules(host(), rule)
        by_hand = host()
        by_hand.inner = Local()
        assert torch.equal(model(X), by_hand(X))
        with pytest.raises(RuleError, match="can't be written"):
            rule.to_dict()
    with pytest.raises(SurgeryError, match="returns a int"):
        apply_rules(host(), ReplaceRule("inner", by=lambda: 3))  # type: ignore[arg-type,return-value]


def test_a_module_that_was_made_brings_its_numbers() -> None:
    inner = foreign.Experts(4)
    model = apply_rules(host(), ReplaceRule("inner", by=inner))
    by_hand = host()
    by_hand.inner = inner
    assert torch.equal(model(X), by_hand(X))
    assert not {id(p) for p in inner.parameters()} & {id(p) for p in model.parameters()}


def test_a_module_in_several_places_is_one() -> None:
    model, by_hand, _ = pair("shared")
    assert len(adapter_state_dict(model)) == 2
    assert sum(p.numel() for p in model.inner.adapters.parameters()) == 20


def test_a_forward_that_remembers_is_refused() -> None:
    with pytest.raises(PlanError, match="sets last on the module"):
        apply_rules(host(), ReplaceRule("inner", by=foreign.Remembering))
    with pytest.raises(SurgeryError, match="sets count on the module"):
        apply_rules(host(), ReplaceRule("inner", by=foreign.Counting), example_inputs=X)
    with pytest.raises(SurgeryError, match="sets seen on the module"):
        apply_rules(host(), ReplaceRule("inner", by=foreign.Listing), example_inputs=X)
    model = host()
    with pytest.raises(PlanError, match="LazyLinear has tensors without a shape"):
        apply_rules(model, ReplaceRule("inner", by=nn.LazyLinear, kwargs={"out_features": 4}))
    assert not hasattr(model.inner, "adapters")


def test_what_must_be_recorded_names_the_line() -> None:
    plan = plan_rules(host(), ReplaceRule("inner", by=foreign.Looking, kwargs={"size": 4}, opaque=False))
    message = str(plan.problems[0])
    assert "Looking.forward can't be recorded as operations" in message
    assert "foreign.py:" in message and "self.up(x) if x.sum() > 0 else self.down(x)" in message


# Arguments ----------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """It calls its children by position, by name, and with options."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Plain(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0, mask: Any = None, **options: Any) -> Any:
        return a + b, {"sum": b}


class Fewer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return 2 * x


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.cell(x, state)


def test_arguments_are_passed_on() -> None:
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    rule = ReplaceRule("inner", by=foreign.Several, kwargs={"size": 4})
    model: Any = apply_rules(Outer(Plain()), rule)
    plain: Any = Outer(rule.make())
    copy_tensors(model, plain)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, y), {}),
        ((x,), {"b": y, "scale": 3.0}),
        ((x, y, 2.0), {"shift": 0.5}),
        ((), {"a": y, "b": x, "mask": x, "shift": y}),
    ]
    for args, kwargs in calls:
        by_name = {{"a": "x", "b": "y"}.get(name, name): value for name, value in kwargs.items()}
        if len(args) == 3:
            args_by_hand, by_name = args[:2], {**by_name, "scale": args[2]}
        else:
            args_by_hand = args
        actual, expected = model(*args, **kwargs), plain(*args_by_hand, **by_name)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1]["sum"], expected[1]["sum"])


def test_a_cell_takes_the_place_of_a_cell() -> None:
    x, h = torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(PlanError, match="can't tell whether Cell.forward is to get 'hx'"):
        apply_rules(Outer(nn.GRUCell(4, 4)), ReplaceRule("inner", by=Cell))
    for input_names in ({"state": "hx"}, {"state": None}):
        model: Any = apply_rules(Outer(nn.GRUCell(4, 4)), ReplaceRule("inner", by=Cell(), inputs=input_names))
        plain: Any = Outer(Cell())
        copy_tensors(model, plain)
        assert torch.equal(model(x, h), plain(x, h) if input_names["state"] else plain(x))
        assert torch.equal(model(x), plain(x))
    model = apply_rules(Outer(nn.GRUCell(4, 4)), ReplaceRule("inner", by=nn.RNNCell, kwargs=CELL))
    plain = Outer(nn.RNNCell(4, 4))
    copy_tensors(model, plain)
    assert torch.equal(model(x, h), plain(x, h)) and torch.equal(model(x), plain(x))
    again = rules_from_json(rules_to_json([ReplaceRule("inner", by=Cell, inputs={"state": "hx"})]))[0]
    assert again.inputs == {"state": "hx"}  # type: ignore[attr-defined]


CELL = {"input_size": 4, "hidden_size": 4}


def test_arguments_that_do_not_fit_are_told() -> None:
    model = apply_rules(Outer(Plain()), ReplaceRule("inner", by=Fewer))
    assert torch.equal(model(torch.ones(1, 2), torch.ones(3)), 2 * torch.ones(1, 2))
    with pytest.raises(PlanError, match=r"Several.forward needs y"):
        apply_rules(Outer(nn.Linear(4, 4)), ReplaceRule("inner", by=foreign.Several, kwargs={"size": 4}))
    with pytest.raises(PlanError, match="name a parameter"):
        apply_rules(Outer(nn.Linear(4, 4)), ReplaceRule("inner", by=Fewer, inputs={"x": "nothing"}))
    wrong: list[dict[str, Any]] = [{"opaque": "yes"}, {"inputs": 3}]
    for field in wrong:
        with pytest.raises(RuleError, match=next(iter(field))):
            ReplaceRule("inner", by=Fewer, **field)


def test_a_transformers_mlp_and_a_whole_layer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2
    )
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    plain, ids = copy.deepcopy(model), torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    layer = LlamaDecoderLayer(config, 1)
    rules = [ReplaceRule("model.layers.0.mlp", by=LlamaMLP(config)), ReplaceRule("model.layers.1", by=layer)]
    apply_rules(model, rules, example_inputs={"input_ids": ids})
    plain.model.layers[0].mlp, plain.model.layers[1] = rules[0].by, layer
    assert torch.equal(model(ids).logits, plain.eval()(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".adapters." in n)
    assert torch.equal(remove(model).eval()(ids).logits, before)


def test_under_rules_of_other_adapters() -> None:
    model, by_hand, _ = pair("recurrent")
    apply_rules(model, LoraRule(["inner", "last"], rank=2, init="random"), adapter="lora")
    remove(model, "lora")
    assert torch.equal(model(X), by_hand(X))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.linear(x), {"input": x * 2}


@pytest.mark.parametrize("opaque", [None, True])
@pytest.mark.parametrize("other", [nn.GRU(4, 4), nn.LSTM(4, 4), nn.RNN(4, 4), Pair()], ids=lambda it: type(it).__name__)
def test_outputs_of_several_tensors_are_passed_on(other: nn.Module, opaque: bool | None) -> None:
    """Recurrent layers keep weak references to their weights, so they are called; plain code is recorded."""
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3, 4)
    apply_rules(model, ReplaceRule("0", by=other, opaque=opaque))
    for ours, theirs in zip(tree_leaves(model(x)), tree_leaves(other(x)), strict=True):
        assert torch.equal(ours, theirs)


# Whole parts of a model -----------------------------------------------------------------------------------------


class Short(nn.Module):
    """In the place of a decoder layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.map = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states + self.map(hidden_states)


def make_short(size: int, scale: float = 1.0) -> nn.Module:
    module = Short(size)
    with torch.no_grad():
        module.map.weight.mul_(scale)
    return module


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()


IDS = torch.arange(6)[None]


@pytest.mark.parametrize("trainable", [None, False])
def test_a_decoder_layer_made_by_a_named_function(trainable: bool | None, tmp_path: Path) -> None:
    rule = ReplaceRule("model.layers.1", by=make_short, kwargs={"size": 16, "scale": 0.5}, trainable=trainable)
    assert rule.to_dict()["by"] == "tests.rules.test_replace.make_short"
    assert rules_from_json(rules_to_json([rule])) == [rule]
    model, by_hand = llama(), llama()
    before = Snapshot(model)
    apply_rules(model, rule)
    by_hand.model.layers[1] = short = Short(16)
    own = model.model.layers[1].adapters.default
    short.map.load_state_dict({"weight": own.map_weight, "bias": own.map_bias})
    assert own.map_weight.requires_grad is (trainable is not False)
    assert torch.equal(model(IDS).logits, by_hand(IDS).logits)
    save_adapter(model, tmp_path)
    load_adapter(again := llama(), tmp_path, trust=True)
    assert torch.equal(again(IDS).logits, by_hand(IDS).logits)
    remove(model)
    assert not before.differences(model)


def test_rules_inside_a_replaced_part_are_told() -> None:
    replaced = ReplaceRule("model.layers.1", by=Short, kwargs={"size": 16})
    told = "LoraRule does nothing at model.layers.1.self_attn.q_proj: ReplaceRule at model.layers.1 computes"
    for rules in ([replaced, LoraRule("q_proj", rank=2)], [LoraRule("q_proj", rank=2), replaced]):
        plan = plan_rules(llama(), rules)
        assert [told in warning for warning in plan.warnings] == [True]
    model = apply_rules(llama(), replaced)
    plan = plan_rules(model, LoraRule("q_proj", rank=2), adapter="later")
    assert "ReplaceRule [default] at model.layers.1" in plan.warnings[0]
    assert not plan_rules(model, LoraRule("layers.0.self_attn.q_proj", rank=2), adapter="later").warnings
    model = apply_rules(llama(), LoraRule("q_proj", rank=2), adapter="first")
    plan = plan_rules(model, replaced)
    assert "LoraRule [first] does nothing at model.layers.1.self_attn.q_proj" in plan.warnings[0]


def test_an_output_that_is_edited_keeps_what_is_inside() -> None:
    model = apply_rules(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), LoraRule("0.0", rank=2))
    assert not plan_rules(model, BottleneckRule("0", size=2, features=4), adapter="b").warnings
