"""Kinds of calls of sites whose rules look into the forward: built by apply_rules, or first met under compilers.

The reference is the model with the change written by hand, or the rewritten model without a compiler.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery.tracing.traced_forward
from surgery import (
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    apply_rules,
    export_onnx,
    load_adapter,
    plan_rules,
    rule,
    save_adapter,
    trace,
)
from tests.support.sampling import sample
from tests.support.tower import (
    MASK,
    RULES,
    Attention,
    Mlp,
    SwishOnceRule,
    SwishRule,
    TemperRule,
    Tower,
    X,
    plainly,
    tempered,
)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """Clear the graphs of other tests, because these tests count new graphs."""
    surgery.tracing.traced_forward._known.clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected(tower: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    blocks: Any = tower.get_submodule("blocks")
    for block in blocks:
        x = plainly(block, x, mask)
    return x


def close(actual: Any, reference: Any) -> None:
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)


# Made ready ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Reset Dynamo, which gives up on code after several errors or recompilations in other tests."""
    torch._dynamo.reset()


def test_the_plan_tells_which_kinds_are_ready() -> None:
    plan = plan_rules(Tower(), TemperRule(Attention), example_inputs=X)
    modes = [
        f"{mode}, {gradients} gradients" for mode in ("evaluation", "training") for gradients in ("without", "with")
    ]
    assert [(call.type, call.kind, call.reason) for call in plan.kinds] == [("Attention", mode, "") for mode in modes]
    assert f"ready: calls of Attention in {'; '.join(modes)}" in str(plan)
    assert len(plan.to_dict()["kinds"]) == 4


def test_a_list_holds_several_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=[X, (X, MASK)]))

    def refuse(*_: Any) -> Any:
        raise AssertionError("a graph was traced though the example shows the call")

    monkeypatch.setattr(surgery.tracing.traced_forward, "traced", refuse)
    for training in (False, True):
        tower.train(training)
        for mask in (None, MASK):
            close(tower(X, mask), expected(tower, X, mask))
            with torch.no_grad():
                close(tower(X, mask), expected(tower, X, mask))


def test_each_example_of_a_list_is_run() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Mlp(), Mlp()

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return self.other(x) if other else self.one(x)

    model = Fork()
    with pytest.raises(SurgeryError, match="never reaches"):
        apply_rules(model, SwishRule(Mlp), example_inputs=X)
    with pytest.raises(SurgeryError, match="example 2 of 2"):
        apply_rules(model, SwishRule(Mlp), example_inputs=[X, (X, 1, 2)])
    assert not any("adapters" in name for name in model.state_dict())
    apply_rules(model, SwishRule(Mlp), example_inputs=[X, {"x": X, "other": True}])
    assert {name.split(".")[0] for name in model.state_dict() if "adapters" in name} == {"one", "other"}


def test_load_adapter_takes_a_list(tmp_path: Any) -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    folder = save_adapter(tower, tmp_path / "adapter")
    other = Tower().eval()
    other.load_state_dict({name: t for name, t in tower.state_dict().items() if "adapters" not in name})
    load_adapter(other, folder, example_inputs=[X, (X, MASK)], trust=True)
    close(other(X, MASK), expected(tower, X, MASK))


def test_a_mode_that_can_not_be_held_is_told_and_the_others_work() -> None:
    class Picky(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            if self.training and x.sum() > 0:
                scale = 2.0
            return self.down(F.gelu(self.up(x))) * scale

    model = nn.Sequential(Picky()).eval()
    with pytest.warns(SurgeryWarning, match="Picky.forward, which can't be held as a graph in calls in training"):
        apply_rules(model, SwishOnceRule(Picky), example_inputs=X)
    model(X)
    with pytest.raises(SurgeryError, match="mode: training, known: evaluation"):
        model.train()(X)


def test_the_modes_and_statistics_of_the_model_stay() -> None:
    class Normed(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.down(F.gelu(self.norm(self.up(x))))

    model = nn.Sequential(Normed(), nn.Dropout())
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_rules(model, SwishOnceRule(Normed), example_inputs=X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True] * 5 + [False]
    assert torch.equal(torch.get_rng_state(), state)


# Compilers ----------------------------------------------------------------------------------------------------


def run(model: Any, *args: Any, training: bool = False, gradients: bool = True) -> Any:
    model.train(training)
    with torch.set_grad_enabled(gradients):
        return model(*args)


CALLS = list(itertools.product((False, True), (False, True), (None, MASK)))


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow("fullgraph=True is stricter"))])
def test_compiled_at_any_kind_of_call(fullgraph: bool) -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X))
    compiled = torch.compile(tower, backend="eager", fullgraph=fullgraph)
    for training, gradients, mask in CALLS:
        output = run(compiled, X, mask, training=training, gradients=gradients)
        close(output, expected(tower, X, mask))
        if gradients:
            gradients_by_hand = torch.autograd.grad(expected(tower, X, mask).sum(), temper(tower))
            close(torch.autograd.grad(output.sum(), temper(tower)), gradients_by_hand)


def temper(tower: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in tower.named_parameters() if name.endswith("temper")]


@pytest.mark.slow("a tower is compiled with fullgraph=True")
def test_a_model_compiled_at_once_meets_no_break() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    surgery.tracing.traced_forward._known.clear()
    explained = torch._dynamo.explain(tower)(X, MASK)
    assert explained.graph_break_count == 0
    compiled = torch.compile(tower, backend="eager", fullgraph=True, dynamic=True)
    for size in (3, 5, 9):  # with more than six positions the forward takes another branch
        x = torch.randn(2, size, 8)
        close(compiled(x, MASK[:1, :1]), expected(tower, x, MASK[:1, :1]))


@pytest.mark.filterwarnings("ignore")  # torch's warnings
def test_a_training_step_by_inductor() -> None:
    tower = tempered(apply_rules(Tower(1), RULES, example_inputs=X)).train()
    output = torch.compile(tower)(X, MASK)
    torch.testing.assert_close(output, expected(tower, X, MASK), rtol=1e-4, atol=1e-5)
    gradients_by_hand = torch.autograd.grad(expected(tower, X, MASK).sum(), temper(tower))
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), temper(tower)), gradients_by_hand, rtol=1e-4, atol=1e-5
    )


def copied_again(tower: nn.Module) -> nn.Module:
    return copy.deepcopy(tower)


def unpickled(tower: nn.Module) -> nn.Module:
    stored = io.BytesIO()
    torch.save(tower, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def switched(tower: nn.Module) -> nn.Module:
    apply_rules(tower, TemperRule(Attention), adapter="other", example_inputs=X)
    return activate(tower, "default")


def in_double(tower: nn.Module) -> nn.Module:
    return tower.to(torch.float64)


CHANGES: list[Callable[[nn.Module], nn.Module]] = [copied_again, unpickled, switched, in_double]


@pytest.mark.parametrize("change", sample(CHANGES, 2))
@pytest.mark.parametrize("tool", ["compile", "strict", "loose"])
def test_compiled_and_exported_after_a_change(change: Callable[[nn.Module], nn.Module], tool: str) -> None:
    tower = change(tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval())
    surgery.tracing.traced_forward._known.clear()
    x = X.to(next(tower.parameters()).dtype)
    if tool == "compile":
        close(torch.compile(tower, backend="eager", fullgraph=True)(x, MASK), expected(tower, x, MASK))
    else:
        program = torch.export.export(tower, (x, MASK), strict=tool == "strict")
        close(program.module()(x, MASK), expected(tower, x, MASK))
        assert not program.graph_signature.inputs_to_lifted_tensor_constants  # no made-up tensors
    close(tower(x, MASK), expected(tower, x, MASK))


def test_bfloat16_compiled() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval().bfloat16()
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X.bfloat16()), tower(X.bfloat16()))


def test_exported_to_onnx_with_a_new_kind_of_call(tmp_path: Any) -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    report = export_onnx(tower, tmp_path / "tower.onnx", (X, MASK), adapters="constant", dynamic=False)
    assert report.parity is not None


def test_a_call_that_is_refused_says_what_is_new() -> None:
    class Sometimes(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0, linear: bool = False) -> Tensor:
            return self.down(self.up(x)) if linear else super().forward(x, scale)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sometimes()

        def forward(self, x: Tensor, linear: bool = False) -> Tensor:
            return self.inner(x, linear=linear)

    model = apply_rules(Outer(), SwishRule(Sometimes), example_inputs=X)
    message = "argument linear: True, known: False"
    with pytest.raises(SurgeryError, match=message):
        model(X, linear=True)
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="eager", fullgraph=True)(X, linear=True)
    with pytest.raises(SurgeryError, match=message):
        torch.compile(model, backend="eager")(X, linear=True)
    with pytest.raises(SurgeryError, match=message):
        torch.export.export(model, (X,), {"linear": True})


def twice(x: Tensor) -> Tensor:
    return _doubled(x)


_doubled = torch.compile(lambda x: x * 2, backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_compiled_code_inside_of_a_forward_does_not_wait_for_the_compiler() -> None:
    class Child(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    class Outer(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.child(self.down(F.gelu(self.up(x))))

    model = apply_rules(Outer(), SwishOnceRule(Outer), example_inputs=X)
    surgery.tracing.traced_forward._known.clear()
    again = copy.deepcopy(model)
    close(torch.compile(again, backend="eager")(X), model(X))


# A user's function, and outputs with extra keys -----------------------------------------------------------------


def branching(y: Tensor) -> Tensor:
    if y.sum() > 0:  # the user's line
        return y + 1
    return y


@rule("test-branching")
class BranchingRule(Rule):
    why_not_merged = "a function is no weight"

    def rewrite(self, site: Any) -> Any:
        return site.apply(branching, site.output)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_a_function_that_breaks_the_graph_is_named() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), BranchingRule("0"))
    with pytest.raises(Exception, match="(?s)BranchingRule.*test_kinds.py.*in branching.*y.sum"):
        torch.compile(model, backend="eager", fullgraph=True)(X)
    close(torch.compile(model, backend="eager")(X), model(X))


def test_a_model_output_with_keys_of_its_own(tmp_path: Any) -> None:
    outputs: Any = pytest.importorskip("transformers.modeling_outputs")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            output = outputs.BaseModelOutput(last_hidden_state=F.gelu(self.layer(x)))
            output["extra"] = output.last_hidden_state * 2
            return output

    net = Net().eval()
    graph = trace(net, X)(X)
    assert type(graph) is outputs.BaseModelOutput and torch.equal(graph.extra, net(X).extra)
    assert list(graph) == ["last_hidden_state", "extra"]
    apply_rules(net, SwishRule(Net), example_inputs=X)
    up = net.layer(X)
    close(net(X).extra, 2 * up * torch.sigmoid(1.702 * up))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export_onnx(net, tmp_path / "net.onnx", X, adapters="constant")
    assert list(report.manifest["outputs"]) == ["last_hidden_state", "extra"]


# Models of transformers -----------------------------------------------------------------------------------------


@rule("test-scaled-queries")
class ScaledQueriesRule(Rule):
    """Multiplies queries by a number, as if their projection had other weights."""

    why_not_merged = "it is looked for in the forward"

    def rewrite(self, site: Any) -> Any:
        names = ("q_proj", "query")
        (node,) = [node for node in site.graph.nodes if node.op == "call_module" and str(node.target) in names]
        queries = site.at(node)
        site.replace(queries, queries * site.param("scale", (1,), 1.5))


def scaled(model: Any, name: str) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path, parameter in other.named_parameters():
            if f".{name}." in path:
                parameter.mul_(1.5)
    return other


def llama() -> tuple[Any, Any, dict[str, Tensor]]:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=32, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    kind = transformers.models.llama.modeling_llama.LlamaAttention
    ids = torch.arange(14).view(2, 7)
    reference = scaled(model, "q_proj")
    return apply_rules(model, ScaledQueriesRule(kind), example_inputs={"input_ids": ids}), reference, {"input_ids": ids}


def bert() -> tuple[Any, Any, dict[str, Tensor]]:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    config = transformers.BertConfig(
        num_hidden_layers=2, vocab_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    model = transformers.BertForMaskedLM(config).eval()
    kind = transformers.models.bert.modeling_bert.BertSelfAttention
    ids = torch.arange(14).view(2, 7)
    reference = scaled(model, "query")
    return apply_rules(model, ScaledQueriesRule(kind), example_inputs={"input_ids": ids}), reference, {"input_ids": ids}


@pytest.mark.parametrize("make", sample([bert, llama], 2))
def test_transformers_compiled_whole(make: Callable[[], tuple[Any, Any, dict[str, Tensor]]]) -> None:
    model, reference, inputs = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    whole = torch.ones_like(inputs["input_ids"])
    padded = whole.clone()
    padded[0, 5:] = 0
    for more in ({}, {"attention_mask": whole}, {"attention_mask": padded}):
        close(compiled(**inputs, **more).logits, reference(**inputs, **more).logits)
    for network in (compiled, reference):
        network.train()
    output, reference_output = (
        network(**inputs, attention_mask=padded, labels=inputs["input_ids"]) for network in (compiled, reference)
    )
    close(output.loss, reference_output.loss)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "adapters" in name)


def test_a_decoder_with_a_cache_compiled() -> None:
    model, reference, inputs = llama()
    compiled = torch.compile(model, backend="eager")
    ids, cache, other = inputs["input_ids"], None, None
    with torch.no_grad():
        for _ in range(3):
            output = compiled(input_ids=ids, past_key_values=cache, use_cache=True)
            reference_output = reference(input_ids=ids, past_key_values=other, use_cache=True)
            close(output.logits, reference_output.logits)
            cache, other, ids = (
                output.past_key_values,
                reference_output.past_key_values,
                reference_output.logits[:, -1:].argmax(-1),
            )


@pytest.mark.parametrize("make", sample([bert, llama], 2))
@pytest.mark.parametrize("strict", [False, True])
def test_transformers_exported(make: Callable[[], tuple[Any, Any, dict[str, Tensor]]], strict: bool) -> None:
    model, reference, inputs = make()
    more: dict[str, Any] = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    if make is llama:
        more["use_cache"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (), more, strict=strict)
    close(program.module()(**more).logits, reference(**more).logits)
