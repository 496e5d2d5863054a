"""Rules on the meta device: after to_empty, an adapter without values raises errors until it gets values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery import (
    SurgeryError,
    activate,
    adapter_state_dict,
    apply_rules,
    deactivate,
    load_adapter,
    load_adapter_state_dict,
    merge,
    remove,
    save_adapter,
)
from surgery.rules import IA3Rule, LoraRule, TrainRule, VeraRule

X = torch.ones(1, 4)


def net(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def empty(*rules: Any) -> Any:
    """A model adapted on the meta device, then moved to the CPU with the base's weights."""
    model = apply_rules(net("meta"), list(rules) or [LoraRule("all-linear", rank=2)])
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict(), strict=False)
    return model


def test_a_call_is_refused_until_values_come(tmp_path: Path) -> None:
    model = empty()
    for call in (lambda: model(X), lambda: merge(model), lambda: save_adapter(model, tmp_path)):
        with pytest.raises(SurgeryError, match="the adapter 'default' has no values yet"):
            call()
    assert all(bool(tensor.isnan().all()) for tensor in adapter_state_dict(model).values())
    assert torch.equal(deactivate(model)(X), net()(X))
    activate(model)
    with pytest.raises(SurgeryError, match="no values"):
        copy.deepcopy(model)(X)
    model.double().float()  # replaces the tensors
    with pytest.raises(SurgeryError, match="no values"):
        model(X)
    remove(model)
    assert not model[0]._forward_pre_hooks and torch.equal(model(X), net()(X))


@pytest.mark.parametrize("rule", [
    LoraRule("all-linear", rank=2), LoraRule("all-linear", rank=2, dora=True), VeraRule("all-linear", rank=2),
    IA3Rule("0"), TrainRule("2"),
], ids=lambda rule: f"{rule.label}{getattr(rule, 'dora', '')}")  # fmt: skip
def test_reset_parameters_gives_what_rules_start_with(rule: Any) -> None:
    """Calls reset_parameters on each module that has it, as FSDP does; the base's weights then come from a file."""
    model = empty(rule)
    boxes = [module for module in model.modules() if type(module).__name__ == "AdapterTensors"]
    for box in boxes:
        box.reset_parameters()
    torch.testing.assert_close(model(X), net()(X))
    assert not model[0]._forward_pre_hooks
    started = apply_rules(net(), rule)
    for (name, mine), theirs in zip(
        adapter_state_dict(model).items(), adapter_state_dict(started).values(), strict=True
    ):
        drawn = isinstance(rule, LoraRule) and name.endswith("A")  # random, with the same distribution
        torch.testing.assert_close(
            mine.abs().max() <= 0.5 if drawn else mine, theirs.abs().max() <= 0.5 if drawn else theirs
        )
    model(X).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "adapters" in name)


def test_values_that_come_in_other_ways() -> None:
    trained = apply_rules(net(), LoraRule("all-linear", rank=2, init="random"))
    expected = trained(X)

    def by_hand(model: Any) -> None:
        with torch.no_grad():
            for name, tensor in adapter_state_dict(model).items():
                tensor.copy_(adapter_state_dict(trained)[name])

    ways = [
        lambda model: model.load_state_dict(trained.state_dict()),
        lambda model: model.load_state_dict(trained.state_dict(), assign=True),
        lambda model: load_adapter_state_dict(model, adapter_state_dict(trained)),
        by_hand,
    ]
    for way in ways:
        model = empty()
        way(model)
        assert torch.equal(model(X), expected)
    model = apply_rules(net("meta"), LoraRule("all-linear", rank=2))
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model(X), expected)


def test_tensors_with_values_that_are_emptied() -> None:
    model = apply_rules(net(), LoraRule("0", rank=2))
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    model[0].adapters.default.reset_parameters()  # on real memory, the values stay
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items())
    model.to(torch.float64).to(torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items())
    model.to_empty(device="cpu")
    assert all(bool(tensor.isnan().all()) for tensor in adapter_state_dict(model).values())
    with pytest.raises(SurgeryError, match="no values"):
        merge(model)


# The base's weights come later -----------------------------------------------------------------------------------

LATER = [
    LoraRule("all-linear", rank=2), LoraRule("all-linear", rank=2, dora=True), VeraRule("all-linear", rank=2),
    IA3Rule("0"), TrainRule("2"),
]  # fmt: skip


@pytest.mark.parametrize("rule", LATER, ids=lambda rule: f"{rule.label}{getattr(rule, 'dora', '')}")
def test_a_base_that_is_loaded_after_the_rules(rule: Any) -> None:
    """`load_state_dict(assign=True)` replaces the base's tensors, and leaves those of adapters on the meta device."""
    model = apply_rules(net("meta"), rule)
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    with pytest.raises(SurgeryError, match="are on the meta device, and the base is not"):
        model(X)
    assert torch.equal(deactivate(model)(X), net()(X))
    activate(model)
    for box in (module for module in model.modules() if type(module).__name__ == "AdapterTensors"):
        box.reset_parameters()
    torch.testing.assert_close(model(X), net()(X))
    model(X).sum().backward()
    shared = {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name.endswith("vera_A")}
    assert len(shared) <= 1 and not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("rule", LATER, ids=lambda rule: f"{rule.label}{getattr(rule, 'dora', '')}")
@pytest.mark.parametrize("base_first", [True, False])
def test_loaded_adapters_survive_the_loading_of_the_base(rule: Any, base_first: bool, tmp_path: Path) -> None:
    trained = apply_rules(net(), rule)
    with torch.no_grad():
        for tensor in adapter_state_dict(trained).values():
            tensor.add_(0.1)
    expected = trained(X)
    save_adapter(trained, tmp_path)
    for model in (net("meta"), apply_rules(net("meta"), rule)):
        if base_first and model[0].weight.is_meta and hasattr(model[0], "adapters"):
            model.load_state_dict(net().state_dict(), strict=False, assign=True)
        if hasattr(model[0], "adapters") or hasattr(model[2], "adapters"):
            load_adapter_state_dict(model, adapter_state_dict(trained))
        else:
            load_adapter(model, tmp_path)
        model.load_state_dict(net().state_dict(), strict=False, assign=True)
        assert torch.equal(model(X), expected)


def test_moving_an_adapter_without_values_gives_memory_without_values() -> None:
    """As accelerate's `load_checkpoint_and_dispatch` does after it has loaded the base."""
    model = apply_rules(net("meta"), LoraRule("all-linear", rank=2))
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    model.to(torch.float64)
    model.to("cpu")
    assert model[0].adapters.default.A.dtype == torch.float64
    with pytest.raises(SurgeryError, match="memory without numbers"):
        model(X.double())
    for box in (module for module in model.modules() if type(module).__name__ == "AdapterTensors"):
        box.reset_parameters()
    torch.testing.assert_close(model(X.double()), net().double()(X.double()))


def test_starts_that_decompose_the_weight_are_refused_by_name() -> None:
    for init in ("pissa", "olora", "mica"):
        model = net("meta")
        with pytest.raises(
            SurgeryError, match=f"init='{init}' decomposes the base's weight, which is on the meta device"
        ):
            apply_rules(model, LoraRule("0", rank=2, init=init))
        assert "adapters" not in model[0]._modules


def test_a_plan_for_a_large_model_makes_no_tensor_of_the_base() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from surgery import plan_rules, summary

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes))  # type: ignore[arg-type]
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and not t.is_meta)
            return result

    rule = LoraRule("all-linear", rank=16)
    with Watch():
        assert len(plan_rules(model, rule).steps) == 560
        apply_rules(model, rule)
        assert summary(model).trainable == 207_093_760
    assert sum(made) < 10_000
