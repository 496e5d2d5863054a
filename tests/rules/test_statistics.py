"""Running statistics, which training changes: `remove` restores those of the base, and rules keep or freeze them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    PlanError,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    deactivate,
    export_onnx,
    forget,
    load_adapter,
    merge,
    plan_rules,
    remove,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import LoraRule, NormRule, StatisticsRule, TrainRule
from surgery.testing import Snapshot, assert_reversible

LORA = LoraRule(["up", "down"], rank=2, init="random")


class Average(nn.Module):
    """Centres by a moving average of its own, and counts calls."""

    centre: Tensor
    calls: Tensor
    fixed: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("fixed", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
            self.calls += 1
        return (x - self.centre) * self.fixed


def net() -> Any:
    torch.manual_seed(0)
    norms = nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True), nn.BatchNorm1d(6, affine=False))
    return named(nn.Linear(4, 6), nn.BatchNorm1d(6), Average(6), _Channels(norms), nn.Linear(6, 2))


def named(*modules: nn.Module) -> Any:
    return nn.Sequential(OrderedDict(zip(["up", "norm", "average", "channels", "down"], modules, strict=False)))


class _Channels(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(-1, 6, 1).expand(-1, 6, 3)).mean(-1)


MOVING = ["norm", "average", "channels.inner.0", "channels.inner.1"]


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(steps):
        torch.manual_seed(step)
        optimiser.zero_grad()
        model(torch.randn(8, 4) + 2).square().mean().backward()
        optimiser.step()


def test_they_come_back_to_the_bit() -> None:
    model = net()
    before, x = Snapshot(model), torch.randn(3, 4)
    output = model.eval()(x)
    model.train()
    apply_rules(model, LORA)
    train(model)
    assert len(before.differences(model)) > 10 and not torch.equal(model.eval()(x), output)
    remove(model.train())
    assert not before.differences(model) and torch.equal(model.eval()(x), output)


def test_the_base_has_its_own_while_no_adapter_is_live() -> None:
    model, x = net(), torch.randn(3, 4)
    output, before = model.eval()(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    apply_rules(model, LORA)
    train(model)
    adapted = model.eval()(x)
    for around in (lambda: using(model, None), lambda: using(model, [])):
        with around():
            assert torch.equal(model(x), output)
        assert torch.equal(model(x), adapted)
    deactivate(model)
    assert torch.equal(model(x), output)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_state_dict(model).items())
    assert torch.equal(activate(model)(x), adapted)
    merge(model)
    torch.testing.assert_close(model(x), adapted)
    assert torch.equal(unmerge(model)(x), adapted)
    other = pickle.loads(pickle.dumps(copy.deepcopy(deactivate(model))))
    assert torch.equal(other(x), output) and torch.equal(activate(other)(x), adapted)
    assert torch.equal(remove(other)(x), output) and torch.equal(remove(model)(x), output)


def test_a_merge_for_good_keeps_what_the_adapter_was_trained_with() -> None:
    model, x = net(), torch.randn(3, 4)
    apply_rules(model, LORA)
    train(model)
    adapted = model.eval()(x)
    merge(model)
    forget(model)
    torch.testing.assert_close(model(x), adapted)
    assert not any("_surgery" in name or "statistics" in name for m in model.modules() for name in m.__dict__)


def test_another_base_that_is_loaded_is_the_one_to_come_back_to() -> None:
    model, other = net(), net()
    train(other)
    apply_rules(model, LORA)
    model.load_state_dict(other.state_dict(), strict=False)
    trained = copy.deepcopy(model)
    train(trained)
    after = copy.deepcopy(model)
    after.load_state_dict(trained.state_dict())  # a checkpoint of training goes on from it
    for item in (model, trained, after):
        actual = remove(item).state_dict()
        assert all(torch.equal(actual[key], tensor) for key, tensor in other.state_dict().items())
        assert not any(module._load_state_dict_pre_hooks for module in item.modules())


def test_the_plan_says_which() -> None:
    plan = plan_rules(net(), LORA)
    assert plan.statistics == MOVING == plan.to_dict()["statistics"]
    message = (
        "training moves the running statistics of modules 'norm', 'average', 'channels.inner.0', 'channels.inner.1'"
    )
    assert f"{message}: remove puts them back" in str(plan)
    assert plan_rules(net(), [LORA, StatisticsRule()]).statistics == ["average"]
    assert plan_rules(net(), [LORA, NormRule(["norm"])]).statistics == MOVING[1:]
    plain = named(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    assert not plan_rules(plain, LoraRule("up")).statistics


@pytest.mark.parametrize("make", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"])
def test_spectral_norms_vectors_move_too(make: Any) -> None:
    model = named(nn.Linear(4, 4), make(nn.Linear(4, 4)))
    before = Snapshot(model)
    apply_rules(model, LoraRule("up", rank=2, init="random"))
    train(model)
    assert before.differences(model)
    assert not before.differences(remove(model))


def test_models_without_any_keep_nothing() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout()), LoraRule("0", rank=2))
    assert not any("_surgery_statistics" in module.__dict__ for module in model.modules())


# The rule -----------------------------------------------------------------------------------------------------


def by_hand(model: Any, x: Tensor) -> Tensor:
    """The network in training with every norm in evaluation, by torch's own functions."""
    params = [model[index].adapters.default for index in (0, 4)]
    x = F.linear(x, model[0].weight, model[0].bias) + 4 * x @ params[0].A.T @ params[0].B.T
    for norm in (model[1], model[3].inner[1]):
        x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        x = x * norm.weight + norm.bias if norm.affine else x
    return F.linear(x, model[4].weight, model[4].bias) + 4 * x @ params[1].A.T @ params[1].B.T


def test_frozen_statistics_normalise_in_training_and_do_not_move() -> None:
    torch.manual_seed(0)
    channels = _Channels(nn.Sequential(nn.Identity(), nn.BatchNorm1d(6, affine=False)))
    model = named(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Identity(), channels, nn.Linear(6, 2))
    train(model)
    for parameter in model.parameters():
        parameter.grad = None
    before = Snapshot(model)
    apply_rules(model, [LORA, StatisticsRule(frozen=True)])
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.train()(x), by_hand(model, x))
    train(model)
    statistics = {key: tensor for key, tensor in model.state_dict().items() if "running" in key or "batches" in key}
    assert all(torch.equal(tensor.view(-1).view(torch.uint8), before.bits[key]) for key, tensor in statistics.items())
    torch.testing.assert_close(model(x), by_hand(model, x))
    torch.testing.assert_close(model.eval()(x), by_hand(model, x))
    assert not before.differences(remove(model.train()))


def test_statistics_of_the_adapters_own_are_saved_switched_and_merged(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 4)
    model[2] = nn.Identity()
    output, before = model.eval()(x), Snapshot(model)
    torch.manual_seed(1)
    apply_rules(model, [LORA, StatisticsRule()], adapter="a")
    train(model)
    reference = net()
    reference[2] = nn.Identity()
    torch.manual_seed(1)
    train(apply_rules(reference, LORA))  # the base's move as the adapter's do
    assert torch.equal(model.eval()(x), reference.eval()(x))
    for path in ("norm", "channels.inner.0", "channels.inner.1"):
        norm, own = reference.get_submodule(path), model.get_submodule(path)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(norm, name), getattr(own.adapters.a, name))  # type: ignore[union-attr, operator]
    adapted = model(x)
    with using(model, None):
        assert torch.equal(model(x), output)
    save_adapter(model, tmp_path, "a")
    assert len(adapter_state_dict(model, "a")) == 4 + 9
    merge(model)
    torch.testing.assert_close(model(x), adapted)
    remove(unmerge(model))
    load_adapter(model, tmp_path)
    assert torch.equal(model(x), adapted)
    assert not before.differences(remove(model))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_rule_is_reversible_and_exported(frozen: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net().eval()
    model[2] = model[3] = nn.Identity()
    assert_reversible(model, [LORA, StatisticsRule(frozen=frozen)], example_inputs=torch.randn(3, 4))
    apply_rules(model, [LORA, StatisticsRule(frozen=frozen)])
    if frozen:  # the other is a copy of buffers, as TrainRule's
        assert export_onnx(model, tmp_path / "m.onnx", torch.randn(3, 4), adapters="constant").parity


def test_what_tracks_none_is_refused() -> None:
    for norm in (nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4), nn.LayerNorm(4)):
        with pytest.raises(PlanError, match="it tracks no running statistics"):
            apply_rules(nn.Sequential(norm), StatisticsRule("0"))

    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    with pytest.raises(PlanError, match="not torch's own"):
        apply_rules(nn.Sequential(Own(4)), StatisticsRule("0", frozen=True))
    model: Any = apply_rules(nn.Sequential(Own(4), nn.Linear(4, 4)), [StatisticsRule("0"), TrainRule("1")])
    before = model[0].running_mean.clone()
    train(model)
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize("how", ["merged", "constant", "slots"])
def test_an_export_writes_to_no_tensor_of_the_model(how: Any, tmp_path: Path) -> None:
    """Copies share the model's memory. Tensors that change with the adapters have memory of their own."""
    model, x = net(), torch.randn(5, 4)
    apply_rules(model, LoraRule(["up", "down"], rank=2, init="random"), adapter="a")
    model.train()(x)  # the adapter's statistics are not the base's
    tensors = [*model.parameters(), *model.buffers()]
    before, versions = Snapshot(model), [tensor._version for tensor in tensors]

    def export() -> None:
        report = export_onnx(model, tmp_path / "a.onnx", x, adapters=how, dynamic=False)
        assert report.parity is not None and report.parity.ok

    if how == "slots":  # of which the file would hold the base's
        with pytest.raises(SurgeryError, match="running statistics moved while the adapters were trained") as message:
            export()
        assert message.value.where == "norm, average, channels.inner.0, channels.inner.1"
    else:
        export()
    assert [tensor._version for tensor in tensors] == versions and before.differences(model) == []


def test_slots_of_adapters_that_moved_no_statistics(tmp_path: Path) -> None:
    model, x = net().eval(), torch.randn(5, 4)
    apply_rules(model, LoraRule(["up", "down"], rank=2, init="random"), adapter="a")
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "a.onnx", x, adapters="slots", dynamic=False)
    assert report.parity is not None and report.parity.ok and before.differences(model) == []


def test_a_save_warns_of_statistics_that_it_lacks(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 4)
    apply_rules(model, LORA)
    save_adapter(model, tmp_path / "start")  # nothing has moved
    train(model)
    adapted = model.eval()(x)
    with pytest.warns(SurgeryWarning, match="StatisticsRule") as caught:
        save_adapter(model, tmp_path / "moved")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(f"{path!r}" in str(caught[0].message) for path in MOVING)
    with pytest.warns(SurgeryWarning, match="StatisticsRule"):
        save_adapter(deactivate(model), tmp_path / "idle")
    load_adapter(remove(model), tmp_path / "moved")
    assert not torch.equal(model(x), adapted)  # what the warning says
    save_adapter(model, tmp_path / "again")


@pytest.mark.parametrize("keeper", [StatisticsRule(), StatisticsRule(frozen=True), TrainRule("1")], ids=str)
def test_a_save_does_not_warn_where_a_rule_keeps_the_statistics(keeper: Any, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(3, 4)
    apply_rules(model, LoraRule("0", rank=2), adapter="other")
    train(model)  # the other adapter moves those of the base
    apply_rules(model, [LoraRule("0", rank=2, init="random"), keeper], adapter="kept")
    activate(model, "kept")
    train(model)
    save_adapter(model, tmp_path / "kept", "kept")
    with pytest.warns(SurgeryWarning, match="of module '1'. They belong to the base"):
        save_adapter(model, tmp_path / "other", "other")
    if "frozen=False" in str(keeper) or isinstance(keeper, TrainRule):
        adapted = model.eval()(x)
        load_adapter(remove(model), tmp_path / "kept")
        assert torch.equal(model(x), adapted)
