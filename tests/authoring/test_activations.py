"""Rules on hidden states in tensors, tuples and ModelOutputs: plain arithmetic, and `remove` restores the bits."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    PlanError,
    Rule,
    RuleError,
    SiteError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rule,
    rules_from_json,
    rules_to_json,
)
from surgery.forward.hidden_state import hidden_of, with_hidden
from surgery.rules import (
    BottleneckRule,
    CaptureRule,
    LoraRule,
    ReftRule,
    ReplaceRule,
    SteerRule,
    captured,
    fit_direction,
)
from surgery.testing import assert_equivalent, assert_reversible

Pair = namedtuple("Pair", ["state", "extra"])


class Block(nn.Module):
    """Returns its hidden state in the form that a call asks for."""

    def __init__(self, features: int = 6):
        super().__init__()
        self.lin = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)

    def forward(self, x: Tensor, form: str = "tensor", mask: Tensor | None = None) -> Any:
        y = self.norm(x + torch.tanh(self.lin(x)))
        if mask is not None:
            y = y * mask
        forms: dict[str, Callable[[], Any]] = {
            "tensor": lambda: y,
            "tuple": lambda: (y, x),
            "list": lambda: [y, x],
            "dict": lambda: {"loss": y.sum(), "state": y, "extra": x},
            "namedtuple": lambda: Pair(y, x),
            "loss": lambda: (y.sum(), y),
        }
        return forms[form]()


class Stack(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, form: str = "tensor") -> Tensor:
        for layer in self.layers:
            x = hidden_of(layer(x, form))
        return x


FORMS = ("tensor", "tuple", "list", "dict", "namedtuple", "loss")


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


# The hidden state ---------------------------------------------------------------------------------------------


def test_the_hidden_state_of_an_output_and_its_replacement() -> None:
    x, new, other = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2,), 5.0)
    loss = torch.tensor(1.0)
    for output in (x, (x, other), [x, other], {"a": x, "b": other}, OrderedDict(a=x), Pair(x, other), (loss, x)):
        assert hidden_of(output) is x
        new_output = with_hidden(output, new)
        assert type(new_output) is type(output) and hidden_of(new_output) is new
        if not isinstance(output, Tensor):
            assert len(new_output) == len(output)
    assert with_hidden((loss, x, None), new) == (loss, new, None)
    assert with_hidden(x.bfloat16(), new).dtype is torch.bfloat16
    for nothing in (None, "text", (None, loss), {}):
        with pytest.raises(SiteError, match="without a hidden state"):
            hidden_of(nothing)


def test_the_hidden_state_of_a_model_output(optional: Callable[..., Any]) -> None:
    outputs = optional("transformers.modeling_outputs")
    output = outputs.CausalLMOutput(loss=torch.tensor(1.0), logits=torch.zeros(2, 3))
    new_output = with_hidden(output, torch.ones(2, 3))
    assert type(new_output) is type(output) and new_output.loss is output.loss and bool((new_output.logits == 1).all())
    assert bool((new_output[1] == 1).all()) and bool((output.logits == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_a_rule_reaches_the_hidden_state_whatever_the_form(form: str) -> None:
    model, x = Stack().eval(), torch.randn(2, 4, 6)
    before = model(x, form)
    apply_rules(model, [SteerRule("layers.1", direction=torch.arange(6.0), scale=2)], example_inputs=(x, form))
    torch.testing.assert_close(model(x, form), before + 2 * torch.arange(6.0))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, form), model(x, form))
        assert torch.equal(remove(other)(x, form), before)
    assert type(model.layers[1](x, "namedtuple")) is Pair


def with_options(forward: Any) -> Any:
    """Fill in a missing keyword option, as the decorators of transformers' forwards do."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("scale") is None:
            kwargs["scale"] = 3.0
        return forward(self, *args, **kwargs)

    return wrapper


class Optioned(nn.Module):
    @with_options
    def forward(self, x: Tensor, scale: float | None = None) -> tuple[Tensor, float]:
        return x * scale, scale  # type: ignore[operator,return-value]


def test_a_decorated_forward_gets_its_options_by_name() -> None:
    model, x = nn.ModuleList([Optioned()]), torch.randn(2, 2)
    apply_rules(model, [SteerRule("0", direction=[1.0, 2.0])])
    torch.testing.assert_close(model[0](x), (x * 3 + torch.tensor([1.0, 2.0]), 3.0))
    torch.testing.assert_close(model[0](x, 2.0), (x * 2 + torch.tensor([1.0, 2.0]), 2.0))


def test_a_function_applied_must_have_a_name() -> None:
    @rule("test-nameless")
    class Nameless(Rule):
        def rewrite(self, site: Any) -> Any:
            return site.apply(lambda value: value, site.output)

    (problem,) = plan_rules(nn.Sequential(nn.Linear(2, 2)), [Nameless("0")]).problems
    assert "no name to import it by" in str(problem)


RULES: dict[str, Rule] = {
    "bottleneck": BottleneckRule(Block, size=3),
    "parallel": BottleneckRule(Block, size=3, placement="parallel", activation="gelu", scale=0.5, dropout=0.2),
    "reft": ReftRule(Block, rank=2),
    "reft-positions": ReftRule(Block, rank=2, positions="f1+l1", dropout=0.1),
    "steer": SteerRule(Block, direction=[1.0] * 6, positions="l2"),
    "capture": CaptureRule(Block),
    "capture-input": CaptureRule(Block, what="input"),
    "capture-result": CaptureRule(Block, what="result"),
}


@pytest.mark.parametrize("form", ("tensor", "tuple", "dict"))
@pytest.mark.parametrize("name", RULES)
def test_reversible(name: str, form: str) -> None:
    assert_reversible(Stack().eval(), [RULES[name]], example_inputs=(torch.randn(2, 4, 6), form))


@pytest.mark.parametrize("name", RULES)
def test_written_and_read(name: str) -> None:
    (read,) = rules_from_json(rules_to_json([RULES[name].replace(targets="layers.0")]))
    assert read == RULES[name].replace(targets="layers.0")


class Each(nn.Module):
    """One model for each rule, all with the same input: tracing them together is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict(
            {name: disturb(apply_rules(Stack(1).eval(), [rule])) for name, rule in RULES.items()}
        )

    def forward(self, x: Tensor, form: str = "tensor") -> list[Tensor]:
        return [model(x, form) for model in self.models.values()]

    def check(self, outputs: Sequence[Tensor], x: Tensor, form: str = "tensor") -> None:
        assert len(outputs) == len(RULES)
        for (name, model), tensor in zip(self.models.items(), outputs, strict=True):
            torch.testing.assert_close(tensor, model(x, form), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_export(form: str, strict: bool) -> None:
    every, x = Each().eval(), torch.randn(2, 4, 6)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(every, (x, form), strict=strict, dynamic_shapes=({1: length}, None)).module()
    for other in (x, torch.randn(2, 7, 6)):
        every.check(exported(other, form), other, form)


def test_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    every, x = Each().eval(), torch.randn(2, 4, 6)
    compiled = torch.compile(every, backend="aot_eager", fullgraph=True)
    for form in ("tensor", "tuple", "dict"):
        every.check(compiled(x, form), x, form)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "deberta", "t5", "whisper", "vit"])
def test_on_the_layers_of_transformers_models(family: str) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    model, batch = tiny.FAMILIES[family]()
    model.eval()
    layers = "re:.*(layers?|h|block)[.][0-9]+"
    rules = [BottleneckRule(layers, size=2), ReftRule(layers, rank=2), SteerRule(layers), CaptureRule(layers)]
    assert_reversible(model, rules, example_inputs=batch)
    with torch.no_grad():
        before = model(**batch)
        apply_rules(model, [SteerRule(layers, direction=[0.1] * 31 + [0.9])])
        assert not torch.equal(model(**batch)[0], before[0])


def test_training_reaches_them_through_gradient_checkpointing() -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    model, batch = tiny.llama()
    apply_rules(model, [BottleneckRule("re:.*layers[.][0-9]", size=2), ReftRule("mlp", rank=2)], example_inputs=batch)
    disturb(model)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 2 * 4 + 2 * 3
    for plain_grad, checkpointed_grad in zip(*grads, strict=True):
        torch.testing.assert_close(plain_grad, checkpointed_grad)


@pytest.mark.parametrize("name", ["bottleneck", "reft", "steer"])
def test_generating_with_a_cache_gives_the_same_tokens(name: str) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    model, batch = tiny.llama()
    layers = "re:model[.]layers[.][0-9]"
    rules = {"bottleneck": BottleneckRule(layers, size=4), "reft": ReftRule(layers), "steer": SteerRule(layers)}
    disturb(apply_rules(model.eval(), [rules[name]]))
    ids = batch["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache, without = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape[1] > ids.shape[1]


@pytest.mark.filterwarnings("ignore")  # warnings of the exporter
def test_onnx(optional: Callable[..., Any]) -> None:
    optional("onnxscript")
    optional("onnxruntime")
    every, x = Each().eval(), torch.randn(2, 4, 6)
    program: Any = torch.onnx.export(every, (x,), dynamo=True, verbose=False)
    every.check(program(x), x)


# BottleneckRule -----------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@pytest.mark.parametrize("placement", ["after", "parallel"])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_bottleneck_is_the_papers_formula(activation: Any, placement: Any) -> None:
    layer: Any = nn.Sequential(nn.Linear(5, 4))

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (tensors[f"0.adapters.{n}"] for n in ("down", "down_bias", "up", "up_bias"))
        y = layer[0].weight @ x.T + layer[0].bias[:, None]
        inner = down @ (y if placement == "after" else x.T) + down_bias[:, None]
        return (y + 0.5 * (up @ FUNCTIONS[activation](inner) + up_bias[:, None])).T

    rules = [BottleneckRule("0", size=3, activation=activation, placement=placement, scale=0.5)]
    assert_equivalent(layer, rules, by_hand, torch.randn(7, 5))


def test_bottleneck_drops_only_while_training() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    apply_rules(model, [BottleneckRule("0", dropout=0.5)])
    disturb(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_where_bottlenecks_can_not_go() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Embedding(3, 4), nn.BatchNorm1d(4))
    for target, why in (("0", "not the last"), ("1", "give features="), ("3", "not the last")):
        (problem,) = plan_rules(model, [BottleneckRule(target)]).problems
        assert why in str(problem)
    (problem,) = plan_rules(model, [BottleneckRule("2", placement="parallel")]).problems
    assert "indices" in str(problem)
    assert plan_rules(model, [BottleneckRule("1", features=4), BottleneckRule("2")])
    apply_rules(model, [BottleneckRule("2", size=2)])
    with pytest.raises(PlanError, match="it has an activation in it"):
        merge(model)


# ReftRule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "f2+l1", "f1", "l3"])
def test_reft_is_the_papers_formula(positions: str) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6)), torch.randn(2, 7, 5)
    h = model(x).detach()
    apply_rules(model, [ReftRule("0", rank=3, positions=positions)])
    R, W, b = (tensor.detach() for tensor in adapter_state_dict(model).values())
    torch.testing.assert_close(R @ R.T, torch.eye(3))  # the initial value
    expected = h + (h @ W.T + b - h @ R.T) @ R
    chosen = {"all": range(7), "f2+l1": (0, 1, 6), "f1": (0,), "l3": (4, 5, 6)}[positions]
    untouched = [position for position in range(7) if position not in chosen]
    expected[:, untouched] = h[:, untouched]
    torch.testing.assert_close(model(x), expected)
    if positions != "all":  # a step of decoding
        torch.testing.assert_close(model(x[:, :1]), h[:, :1])


def test_training_keeps_the_rows_orthonormal() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 6))
    apply_rules(model, [ReftRule("0", rank=2)])
    h = nn.Sequential(nn.Linear(5, 6))
    h.load_state_dict(model.state_dict(), strict=False)
    adapter = model[0].adapters.default
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = torch.randn(8, 5), torch.randn(8, 6)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    assert (adapter.R @ adapter.R.T - torch.eye(2)).abs().max() > 1e-4  # the raw tensor is no longer orthonormal
    rows = torch.linalg.svd(adapter.R, full_matrices=False)[2]  # an orthonormal basis of the same span
    edit = model(x) - h(x)
    torch.testing.assert_close(edit, edit @ rows.T @ rows, rtol=1e-4, atol=1e-5)
    projected = (h(x) + edit) @ rows.T @ rows
    Q = torch.linalg.qr(adapter.R.T)[0]
    Q = Q * (Q * adapter.R.T).sum(0).sign()
    torch.testing.assert_close(projected, (h(x) @ adapter.W.T + adapter.b) @ Q.T, rtol=1e-4, atol=1e-5)


def test_reft_refuses() -> None:
    (problem,) = plan_rules(nn.Sequential(nn.Linear(4, 2)), [ReftRule("0", rank=3)]).problems
    assert "3 orthonormal rows" in str(problem)
    for positions in ("", "x1", "f", "f0", "+", "f1+", "l1+f1", 3):
        with pytest.raises(RuleError, match="positions"):
            ReftRule("0", positions=positions)  # type: ignore[arg-type]


# SteerRule ----------------------------------------------------------------------------------------------------


def test_a_direction_is_plain_numbers() -> None:
    steer_rule = SteerRule("0", direction=torch.tensor([1.0, 2.0]))
    assert steer_rule.direction == (1.0, 2.0) and steer_rule == SteerRule("0", direction=[1, 2])
    for wrong in ("abc", torch.ones(2, 2), 3.0, {"0": "x"}):
        with pytest.raises(RuleError, match="direction"):
            SteerRule("0", direction=wrong)  # type: ignore[arg-type]


def test_a_direction_for_each_site_and_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Tanh())
    assert "has 3 features" in str(plan_rules(model, [SteerRule("1", direction=[1.0, 2.0])]).problems[0])
    steer_rule = SteerRule(["0", "1"], direction={"0": [1.0, 2.0]})
    assert "direction has none for it" in str(plan_rules(model, [steer_rule]).problems[0])
    assert "give features=" in str(plan_rules(model, [SteerRule("2")]).problems[0])
    apply_rules(model, [SteerRule("2", direction=[1.0, 2.0, 3.0])])
    x = torch.randn(4, 2)
    torch.testing.assert_close(model(x), model[1](model[0](x)).tanh() + torch.tensor([1.0, 2.0, 3.0]))


def test_a_trained_direction_starts_at_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    apply_rules(model, [SteerRule("0", trainable=True)])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.adapters.default.direction"]
    assert bool((adapter_state_dict(model)["0.adapters.direction"] == 0).all())
    frozen = apply_rules(nn.Sequential(nn.Linear(2, 2)), [SteerRule("0", direction=[1.0, 1.0])])
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("positions", ["all", "l1", "f1+l1"])
def test_fit_direction_is_the_difference_of_means(positions: str) -> None:
    model = Stack().train()
    model.layers[1].eval()
    positive = [torch.randn(2, 4, 6) + 1, torch.randn(1, 3, 6) + 1]
    negative = [(torch.randn(1, 5, 6), "tuple"), {"x": torch.randn(3, 2, 6), "form": "dict"}]
    fitted_rule = fit_direction(model, SteerRule(Block, positions=positions), positive, negative)

    def mean(inputs: list[Tensor]) -> Tensor:
        rows = [model.layers[0](x).detach().unbind(1) for x in inputs]
        chosen = {"all": slice(None), "l1": slice(-1, None), "f1+l1": slice(None, None)}[positions]
        chosen_rows = [[each[0], each[-1]] if positions == "f1+l1" else each[chosen] for each in rows]
        return torch.cat([position for each in chosen_rows for position in each]).double().mean(0)

    expected = mean(positive) - mean([negative[0][0], negative[1]["x"]])  # type: ignore[list-item,index]
    direction = cast(dict[str, tuple[float, ...]], fitted_rule.direction)
    torch.testing.assert_close(torch.tensor(direction["layers.0"], dtype=torch.float64), expected)
    assert direction.keys() == {"layers.0", "layers.1"}
    assert model.training and model.layers[0].training and not model.layers[1].training
    assert not model.layers[0]._forward_hooks
    assert plan_rules(model, [fitted_rule])
    (read,) = rules_from_json(rules_to_json([fitted_rule.replace(targets=["layers.0", "layers.1"])]))
    assert read.direction == fitted_rule.direction  # type: ignore[attr-defined]


def test_fit_direction_refuses() -> None:
    model = Stack()
    with pytest.raises(PlanError):
        fit_direction(model, SteerRule("nothing"), [], [])
    with pytest.raises(RuleError, match="no call reached"):
        fit_direction(model, SteerRule(Block), [], [torch.randn(1, 2, 6)])
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    model, batch = tiny.llama()
    with pytest.raises(RuleError, match="padded"):
        fit_direction(model, SteerRule("model.layers.0"), [batch], [batch])
    assert not model.model.layers[0]._forward_hooks


# CaptureRule --------------------------------------------------------------------------------------------------


def test_captured_activations_come_by_name_and_call() -> None:
    model, x = Stack().eval(), torch.randn(2, 4, 6)
    before = model(x)
    rules = [CaptureRule("layers.0"), CaptureRule("layers.1", what="input", tag="between")]
    apply_rules(model, rules, example_inputs=x)
    with captured(model) as captures:
        for form in FORMS:
            assert torch.equal(model(x, form), before)
    assert captures.keys() == {"layers.0", "between"} and {len(items) for items in captures.values()} == {len(FORMS)}
    for layer_output, next_input in zip(captures["layers.0"], captures["between"], strict=True):
        assert torch.equal(layer_output, next_input) and not layer_output.requires_grad
    assert torch.equal(model.layers[1](captures["between"][0]), before)
    model(x)
    assert len(captures["between"]) == len(FORMS)
    with pytest.raises(SurgeryError, match="nothing was captured under 'lin'"):
        captures["lin"]


def test_a_whole_result_and_gradients() -> None:
    model, x = Stack(1), torch.randn(2, 4, 6)
    apply_rules(model, [CaptureRule("layers.0", what="result")], freeze=True)
    with captured(model, detach=False) as captures:
        model(x, "dict")
    result = captures["layers.0"][0]
    assert list(result) == ["loss", "state", "extra"] and torch.equal(result["extra"], x)
    assert result["state"].requires_grad is False  # the base is frozen
    with captured(model, detach=False) as captures:
        model(x.requires_grad_(), "dict")
    captures["layers.0"][0]["state"].square().sum().backward()
    assert x.grad is not None


def test_only_the_models_own_calls_are_captured() -> None:
    model = apply_rules(Stack(), [CaptureRule(Block)])
    twin, x = copy.deepcopy(model), torch.randn(1, 2, 6)
    with captured(model) as outer:
        twin(x)
        assert not outer
        with captured(twin) as inner:
            model(x)
            twin(x + 1)
    assert len(outer["layers.0"]) == len(inner["layers.0"]) == 1
    assert not torch.equal(outer["layers.0"][0], inner["layers.0"][0])
    assert type(model.layers[0]) is type(model.layers[1])  # one class for all sites


def test_each_thread_has_its_own_contexts() -> None:
    model = apply_rules(Stack(1).eval(), [CaptureRule(Block)])
    captures_by_thread: dict[int, list[Tensor]] = {}
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        with captured(model) as mine:
            for _ in range(20):
                model(torch.full((1, 1, 6), float(number)))
        captures_by_thread[number] = mine["layers.0"]

    with captured(model) as captures:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not captures
    for number, items in captures_by_thread.items():
        expected = model(torch.full((1, 1, 6), float(number)))
        assert len(items) == 20 and all(torch.equal(item, expected) for item in items)


def test_nothing_is_held_once_the_context_is_closed() -> None:
    model = apply_rules(Stack(1), [CaptureRule(Block)])
    with pytest.raises(ZeroDivisionError), captured(model) as captures:
        model(torch.randn(1, 2, 6))
        reference = weakref.ref(captures["layers.0"][0])
        raise ZeroDivisionError
    del captures
    gc.collect()
    assert reference() is None


def test_a_compiled_model_is_captured_too() -> None:
    torch._dynamo.reset()
    model, x = Stack(1).eval(), torch.randn(2, 4, 6)
    apply_rules(model, [CaptureRule(Block)], freeze=True)  # at a graph break, Dynamo warns about .grad of inner tensors
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    with captured(model) as captures:
        assert torch.equal(compiled(x), before) and torch.equal(compiled(x), before)
    compiled(x)
    torch._dynamo.reset()
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), before)
    with captured(model), pytest.raises(RuntimeError, match="(?s)disable"):
        whole(x)
    assert len(captures["layers.0"]) == 2 and torch.equal(captures["layers.0"][0], before)


# ReplaceRule --------------------------------------------------------------------------------------------------


def test_an_activation_and_a_norm_are_replaced() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        model[1].weight.mul_(torch.rand(4) + 0.5)
    rules = [
        ReplaceRule(nn.ReLU, by=nn.SiLU),
        ReplaceRule("1", by="torch.nn.RMSNorm", kwargs={"normalized_shape": 4, "eps": 1e-6}, inherit=True),
    ]
    assert rules_from_json(rules_to_json([rules[1]])) == [rules[1]]
    assert_reversible(model, rules, example_inputs=x)
    apply_rules(model, rules, example_inputs=x)
    torch.testing.assert_close(model(x), F.silu(F.rms_norm(model[0](x), [4], model[1].weight, 1e-6)))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.adapters.default.weight"]
    assert [type(module) for module in model] == [nn.Linear, type(model[1]), type(model[2])]
    assert isinstance(model[1], nn.LayerNorm) and isinstance(model[2], nn.ReLU)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_a_module_of_ones_own_takes_its_place_with_its_tensors() -> None:
    inner = nn.Sequential(nn.Linear(4, 2), nn.GELU(), nn.Dropout(0.5), nn.Linear(2, 3))
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    replace_rule = ReplaceRule("0", by=inner)
    apply_rules(model, [replace_rule], example_inputs=x)
    assert torch.equal(model(x), inner.eval()(x))
    names = ("_0_weight", "_0_bias", "_3_weight", "_3_bias")
    assert list(adapter_state_dict(model)) == [f"0.adapters.{name}" for name in names]
    assert not torch.equal(model.train()(x), model(x))
    with pytest.raises(RuleError, match="can't be written"):
        replace_rule.to_dict()


def test_making_a_plan_draws_no_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules = [ReplaceRule(nn.Linear, by=nn.Linear, kwargs={"in_features": 4, "out_features": 4})]
    state = torch.get_rng_state()
    assert plan_rules(model, rules)
    assert torch.equal(torch.get_rng_state(), state)
    apply_rules(model, rules)
    first, second = (tensor for name, tensor in adapter_state_dict(model).items() if name.endswith("weight"))
    assert not torch.equal(first, second)


def test_what_can_not_be_a_replacement() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for wrong in (None, "torch.nn.", "relu()", 3, torch.relu):
        with pytest.raises(RuleError, match="by="):
            ReplaceRule("1", by=wrong)  # type: ignore[arg-type]
    for wrong in ("torch.nn.Nothing", "os.system", "nowhere.Thing", "Thing"):
        problems = plan_rules(model, [ReplaceRule("1", by=wrong)]).problems
        assert "is not an importable class of nn.Module" in str(problems[0])
    problems = plan_rules(model, [ReplaceRule("1", by="torch.nn.functional.relu")]).problems
    assert "torch.nn.functional.relu can't be made" in str(problems[0])
    with pytest.raises(RuleError, match="kwargs"):
        ReplaceRule("1", by=nn.ReLU(), kwargs={"inplace": True})
    assert "can't be made" in str(plan_rules(model, [ReplaceRule("1", by=nn.Linear)]).problems[0])
    assert not plan_rules(model, [ReplaceRule("1", by=nn.BatchNorm1d(4), opaque=False)])
    assert not plan_rules(model, [ReplaceRule("0", by=nn.ReLU), LoraRule("0")])


def test_what_is_replaced_is_not_run() -> None:
    class Loud(nn.Linear):
        def forward(self, input: Tensor, *, scale: float = 1.0) -> Tensor:
            raise AssertionError("it was run")

    model, x = nn.Sequential(Loud(4, 4), nn.Embedding(5, 4)), torch.randn(3, 4)
    rules = [ReplaceRule("0", by=nn.Linear(4, 2)), ReplaceRule("1", by=nn.Embedding(5, 2))]
    apply_rules(model, rules)
    assert model[0](x).shape == (3, 2) and model[1](torch.tensor([[1, 2]])).shape == (1, 2, 2)
    with pytest.raises(AssertionError, match="it was run"):
        remove(model)[0](x)


def test_replaced_in_half_precision() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4)).bfloat16(), torch.randn(3, 4).bfloat16()
    apply_rules(model, [ReplaceRule("0", by=nn.RMSNorm, kwargs={"normalized_shape": 4})], example_inputs=x)
    assert model(x).dtype is torch.bfloat16
    torch.testing.assert_close(model(x), F.rms_norm(x.float(), [4]).bfloat16())
