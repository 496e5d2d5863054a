"""LoRA on thirteen families of tiny models: identity at the start, plain arithmetic in between, bits at the end."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, SurgeryWarning, apply_rules, merge, plan_rules, remove, summary, unmerge
from surgery.rules import LoraRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.family_runs import tensors

tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")

RANK, ALPHA = 4, 6
SITES = {
    "bert": 13, "albert": 8, "distilbert": 12, "deberta": 13, "gpt2": 8, "llama": 14, "mixtral": 8, "t5": 32,
    "whisper": 32, "vit": 12, "clip": 26, "resnet": 8,
}  # fmt: skip


def rules_for(family: str) -> list[LoraRule]:
    # In a convolutional network, only the head is a linear layer.
    return [LoraRule(nn.Conv2d if family == "resnet" else "all-linear", rank=RANK, alpha=ALPHA)]


def make_unusual(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in an unusual state: mixed modes, frozen parameters, hooks."""
    model, inputs = tiny.FAMILIES[family]()
    draw = random.Random(1)
    for module in model.eval().modules():
        module.training = draw.random() < 0.3 and not isinstance(module, (nn.BatchNorm2d, nn.Dropout))
    for parameter in model.parameters():
        parameter.requires_grad_(draw.random() < 0.5)
    for module in model.modules():
        if draw.random() < 0.2:
            module.register_forward_hook(_nothing)
            module.register_forward_pre_hook(_nothing)
    for module in model.modules():  # functional dropout reads its rate from various attributes
        for name in ("p", "dropout"):
            if type(getattr(module, name, None)) is float:
                setattr(module, name, 0.0)
    return model, inputs


def _nothing(*_: Any) -> None:
    return None


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    outputs = list(tensors(model(**inputs)))
    assert outputs
    return outputs


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def merge_by_hand(base: nn.Module, model: nn.Module) -> nn.Module:
    """The unchanged model with W + (alpha / rank) B A in place of each W, in plain torch arithmetic."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for path, module in model.named_modules():
            boxes: Any = module._modules.get("adapters")
            if boxes is not None:
                A, B = boxes.default.A, boxes.default.B
                weight = base.get_submodule(path)._parameters["weight"]
                assert weight is not None
                delta = (B.flatten(1) @ A.flatten(1)).reshape(B.shape[0], *A.shape[1:])
                turned = type(module).__name__ == "Conv1D"  # GPT-2 stores its weights transposed
                weight += ALPHA / RANK * (delta.t() if turned else delta)
    return base


@pytest.mark.parametrize("family", SITES)
def test_there_and_back(family: str) -> None:
    model, inputs = make_unusual(family)
    rules = rules_for(family)
    kinds = {path: type(module) for path, module in model.named_modules()}
    before, base = Snapshot(model), copy.deepcopy(model)
    output = run(model, inputs)

    assert len(plan_rules(model, rules, example_inputs=inputs).steps) == SITES[family]
    assert before.differences(model) == []
    apply_rules(model, rules, example_inputs=inputs)
    assert same(run(model, inputs), output)  # identity at the start

    disturb(model)
    live = run(model, inputs)
    assert not same(live, output)
    # A branch beside the output and a changed weight round differently, twice a layer.
    for actual, expected in zip(live, run(merge_by_hand(base, model), inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)

    merge(model)
    assert {path: type(model.get_submodule(path)) for path in kinds} == kinds
    for actual, expected in zip(run(model, inputs), live, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    unmerge(model)
    assert same(run(model, inputs), live)
    remove(model)
    assert before.differences(model) == []
    assert same(run(model, inputs), output)


@pytest.mark.parametrize("family", SITES)
def test_every_adapter_tensor_learns_and_nothing_else(family: str) -> None:
    model, inputs = tiny.FAMILIES[family]()
    apply_rules(model.train(), [rules_for(family)[0].replace(init="random", dropout=0.1)])
    sum(tensor.float().square().mean() for tensor in run(model, inputs) if tensor.requires_grad).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    counts = summary(model)
    assert counts.trainable == counts.added == sum(p.numel() for n, p in model.named_parameters() if ".adapters." in n)


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet", "albert"])
@pytest.mark.parametrize("fields", [{"dora": True}, {"rslora": True, "bias": "all"}, {"init": "pissa"}], ids=str)
def test_other_fields_come_out_to_the_bit(family: str, fields: dict[str, Any]) -> None:
    if family == "resnet" and "init" in fields:
        pytest.skip("PiSSA is for linear maps")
    model, inputs = make_unusual(family)
    assert_reversible(model, [rules_for(family)[0].replace(**fields)], example_inputs=inputs)


def test_a_shared_layer_is_one_site_with_its_aliases() -> None:
    """ALBERT runs one layer four times: each linear layer in it gets one A and one B for all runs."""
    model, inputs = tiny.albert()
    apply_rules(model.eval(), rules_for("albert"), example_inputs=inputs)
    disturb(model)
    query = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query
    calls = []
    query.register_forward_hook(lambda *_: calls.append(1))
    run(model, inputs)
    assert len(calls) == model.config.num_hidden_layers == 4
    assert sum("query" in name and name.endswith(".A") for name, _ in model.named_parameters()) == 1


# Mamba hands some weights to its kernel past their modules ------------------------------------------------------


@pytest.fixture
def mamba() -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.mamba()
    return model.eval(), inputs


def test_mamba_is_refused_where_its_code_reads_past_a_module(mamba: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = mamba
    before = Snapshot(model)
    with pytest.raises(PlanError) as caught:
        apply_rules(model, [LoraRule("all-linear", rank=2)], example_inputs=inputs)
    assert {str(problem.where) for problem in caught.value.problems} >= {
        f"backbone.layers.{layer}.mixer.dt_proj" for layer in (0, 1)
    }
    assert "self.dt_proj.weight" in str(caught.value) and "modeling_mamba.py" in str(caught.value)
    assert before.differences(model) == []


def test_mamba_takes_rules_elsewhere(mamba: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = mamba
    assert_reversible(model, [LoraRule("in_proj", rank=2)], example_inputs=inputs)
    rules = [LoraRule("all-linear", exclude="dt_proj", rank=2, init="random")]
    base = run(model, inputs)
    with pytest.warns(SurgeryWarning, match="is bypassed on one branch") as caught:
        apply_rules(model, rules, example_inputs=inputs)
    assert {str(warning.message).split(" at ")[1].split()[0].rpartition(".")[2] for warning in caught} == {
        "x_proj",
        "out_proj",
    }
    assert not same(run(model, inputs), base)


def test_freezing_alone_moves_bits_and_is_no_fault_of_a_rule() -> None:
    """torch.matmul folds a transposed batch only if the weight requires gradients."""
    layer: Any = nn.Sequential(nn.Linear(32, 9, bias=False), nn.Linear(9, 9))
    x = torch.randn(2, 32, 7).transpose(1, 2)
    moved = not torch.equal(layer[0](x), F.linear(x, layer[0].weight.detach()))
    assert_reversible(layer, [LoraRule("1", rank=2)], example_inputs=x)
    if not moved:
        pytest.skip("this build of torch gives the same bits either way")
