"""Rules on a user's own graphs: of symbolic_trace as on any model, of torch.export after `with_layers`."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgery import PlanError, Structure, SurgeryError, apply_rules, merge, plan_rules, remove, unmerge, with_layers
from surgery.rules import LoraRule, NormRule, TrainRule
from surgery.testing import Snapshot, assert_reversible


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv, self.batch = nn.Conv1d(8, 8, 3, padding=1, dilation=1), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.block = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.up(self.embed(tokens)))
        x = self.batch(self.conv(x.mT)).mT
        return self.block(self.head(self.norm(x)))


def symbolic(model: nn.Module, example: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def export(model: nn.Module, example: Tensor) -> Any:
    return with_layers(torch.export.export(model, (example,)).module())  # type: ignore[arg-type]


TOKENS = torch.randint(0, 10, (2, 5))


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("graph_of", [symbolic, export])
@pytest.mark.parametrize("targets", ["up", "all-linear", ["block.0", "embed"], "conv"])
def test_lora_on_a_graph_is_lora_on_the_model(graph_of: Any, targets: Any) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    graph = graph_of(copy.deepcopy(model), TOKENS)
    before = Snapshot(graph)
    expected = model(TOKENS)
    assert torch.equal(graph(TOKENS), expected)
    for target in (model, graph):
        apply_rules(target, [LoraRule(targets, rank=2)], example_inputs=TOKENS)
        torch.manual_seed(1)
        disturb(target)
    ours = {name: p for name, p in graph.named_parameters() if "adapters" in name}
    assert list(ours) and ours.keys() == {name for name, _ in model.named_parameters() if "adapters" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ours:
                ours[name].copy_(parameter)
    live = graph(TOKENS)
    assert torch.equal(live, model(TOKENS)) and not torch.equal(live, expected)
    live.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.values())
    merge(graph, untie=True)
    torch.testing.assert_close(graph(TOKENS), live, rtol=1e-4, atol=1e-5)
    unmerge(graph)
    assert torch.equal(graph(TOKENS), live)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of torch about the pytrees of an exported graph
        copied_graph = copy.deepcopy(graph)
    assert torch.equal(copied_graph(TOKENS), live)
    remove(graph)
    assert not before.differences(graph)


@pytest.mark.parametrize("graph_of", [symbolic, export])
def test_other_rules_and_bits(graph_of: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    graph = graph_of(model, x)
    assert_reversible(graph, [LoraRule("0", rank=2), TrainRule("2"), NormRule()], example_inputs=x)
    if graph_of is symbolic:  # torch can't pickle an exported graph
        apply_rules(graph, [LoraRule("0", rank=2)])
        disturb(graph)
        assert torch.equal(pickle.loads(pickle.dumps(graph))(x), graph(x))


def test_with_layers_keeps_everything_but_the_calls() -> None:
    model = Net().eval()
    exported: Any = torch.export.export(model, (TOKENS,)).module()
    before, names, state = exported(TOKENS), [n for n, _ in exported.named_parameters()], list(exported.state_dict())
    assert with_layers(exported) is exported
    assert torch.equal(exported(TOKENS), before) and torch.equal(before, model(TOKENS))
    assert [n for n, _ in exported.named_parameters()] == names and list(exported.state_dict()) == state
    kinds = {path: type(module).__name__ for path, module in exported.named_modules()}
    expected_types = {path: type(module).__name__ for path, module in model.named_modules()}
    layers = ["embed", "up", "norm", "conv", "head", "block.0", "block.2"]
    assert {path: kinds[path] for path in layers} == {path: expected_types[path] for path in layers}
    assert str(exported.conv) == str(model.conv) and str(exported.norm) == str(model.norm)
    assert exported.head.weight is exported.embed.weight
    calls = [node.target for node in exported.graph.nodes if node.op == "call_module" and node.target in layers]
    assert calls == ["embed", "up", "up", "conv", "norm", "head", "block.0", "block.2"]
    with_layers(exported)  # a second call changes nothing
    assert torch.equal(exported(TOKENS), before)


def test_an_exported_graph_says_what_to_do() -> None:
    exported: Any = torch.export.export(Net().eval(), (TOKENS,)).module()
    before = Snapshot(exported)
    for targets in ("up", "all-linear"):
        with pytest.raises(PlanError, match="with_layers"):
            apply_rules(exported, [LoraRule(targets)])
    assert not before.differences(exported)
    with pytest.raises(PlanError, match="never called"):
        apply_rules(fx.symbolic_trace(Net()), [LoraRule("block")])
    with pytest.raises(SurgeryError, match="not a graph of torch.export"):
        with_layers(fx.symbolic_trace(Net()))
    with pytest.raises(SurgeryError, match="not a graph of torch.export"):
        with_layers(Net())  # type: ignore[arg-type]


def test_a_weight_that_is_computed_stays_in_the_graph() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight * 2, self.bias)

    x = torch.randn(2, 4)
    graph: Any = with_layers(torch.export.export(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)), (x,)).module())  # type: ignore[arg-type]
    assert type(graph.get_submodule("0")) is nn.Module and type(graph.get_submodule("1")) is nn.Linear
    assert not plan_rules(graph, [LoraRule("0")]) and plan_rules(graph, [LoraRule("1")])


@pytest.mark.parametrize("graph_of", [symbolic, export])
def test_structures_in_a_users_graph(graph_of: Any) -> None:
    graph = graph_of(Net().eval(), TOKENS)
    mlp = Structure(lambda x, w, u, b, c: nn.functional.linear(nn.functional.linear(x, w, b).relu(), u, c))
    (occurrence,) = mlp.find(graph)
    assert [str(occurrence.bindings[key]) for key in "wu"] == ["block.0.weight", "block.2.weight"]
