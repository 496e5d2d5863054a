"""What the façade reports of its layers and adapters, beside what PEFT reports of the same model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import surgery.peft as ours
from surgery import SurgeryError, apply_rules
from surgery.rules import LoraRule
from tests.support import tiny
from tests.support.peers import peft


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(self.emb(ids))))


METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["first", "emb", "conv"]},
    "AdaLoraConfig": {"total_step": 9},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 2}, "LoHaConfig": {"r": 2}, "LoKrConfig": {"r": 2}, "OFTConfig": {"oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4}, "HRAConfig": {"r": 2}, "RoadConfig": {"group_size": 4},
    "RandLoraConfig": {"r": 2}, "FourierFTConfig": {"n_frequency": 4}, "ShiraConfig": {"r": 1},
    "C3AConfig": {"block_size": 4}, "LNTuningConfig": {"target_modules": ["norm"]}, "MissConfig": {"r": 2},
    "TrainableTokensConfig": {"target_modules": ["emb"], "token_indices": [1, 3]},
}  # fmt: skip


def both(steps: Any) -> tuple[Any, Any]:
    """What a function of a library and a model returns with PEFT and with the façade."""
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return steps(peft, copy.deepcopy(model)), steps(ours, model)


def reported(model: Any) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in model.get_layer_status()]


@pytest.mark.parametrize("name", METHODS)
def test_each_methods_layers_are_reported_as_peft_reports_them(name: str) -> None:
    def steps(library: Any, model: Any) -> Any:
        config = getattr(library, name)(**{"target_modules": ["first"], **METHODS[name]})
        adapted = library.get_peft_model(model, config)
        whole = dataclasses.asdict(adapted.get_model_status())
        if name in ("AdaLoraConfig", "VeraConfig", "RandLoraConfig", "FourierFTConfig", "ShiraConfig"):
            del whole["total_params"]  # PEFT counts Parameters that are not trained, which are buffers here
        return reported(adapted), whole, adapted.targeted_module_names

    theirs, mine = both(steps)
    assert mine == theirs


@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("merged", [[], ["default"], ["other"], ["default", "other"]])
@pytest.mark.parametrize("disabled", [False, True])
def test_two_adapters_are_reported_as_in_peft(active: str, merged: list[str], disabled: bool) -> None:
    def steps(library: Any, model: Any) -> Any:
        adapted = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["emb", "first"]))
        adapted.add_adapter("other", library.LoraConfig(r=2, target_modules=["first", "head"]))
        adapted.set_adapter(active)
        adapted.set_requires_grad(active, requires_grad=False)
        if disabled:
            adapted.base_model.disable_adapter_layers()
        if merged:
            adapted.merge_adapter(merged)
        layers = reported(adapted)
        for layer in layers:
            layer["merged_adapters"].sort()
        return layers, dataclasses.asdict(adapted.get_model_status()), adapted.targeted_module_names

    theirs, mine = both(steps)
    assert mine == theirs


def test_trained_modules_tokens_and_parameters_are_layers() -> None:
    def steps(library: Any, model: Any) -> Any:
        config = library.LoraConfig(
            r=2, target_modules=["conv"], target_parameters=["first.weight"], modules_to_save=["head"],
            trainable_token_indices={"emb": [1, 2]},
        )  # fmt: skip
        adapted = library.get_peft_model(model, config)
        whole = dataclasses.asdict(adapted.get_model_status())
        return reported(adapted), whole, adapted.targeted_module_names, adapted.targeted_parameter_names

    theirs, mine = both(steps)
    assert mine == theirs


def test_a_frozen_tensor_makes_its_layer_and_the_model_irregular() -> None:
    model = ours.get_peft_model(Net(), ours.LoraConfig(r=2, target_modules=["first", "head"]))
    assert model.get_model_status().requires_grad == {"default": True}
    dict(model.named_parameters())["first.adapters.default.A"].requires_grad_(False)
    assert [layer.requires_grad["default"] for layer in model.get_layer_status()] == ["irregular", True]
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_a_model_without_a_façade_is_reported_under_its_own_names() -> None:
    theirs, mine = both(
        lambda library, model: library.get_layer_status(
            library.inject_adapter_in_model(library.LoraConfig(r=2, target_modules=["first"]), model)
        )
    )
    assert [dataclasses.asdict(layer) for layer in mine] == [dataclasses.asdict(layer) for layer in theirs]
    model = apply_rules(Net(), LoraRule("first", rank=2))
    status = ours.get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    transformer = apply_rules(tiny.llama()[0], LoraRule("q_proj", rank=2))
    assert ours.get_model_status(transformer).base_model_type == "LlamaForCausalLM"


def test_models_without_layers_are_errors() -> None:
    for report in (ours.get_layer_status, ours.get_model_status):
        with pytest.raises(ValueError, match="No adapter layers found in the model") as raised:
            report(Net())
        assert isinstance(raised.value, SurgeryError)
    prefixed = ours.get_peft_model(
        tiny.llama()[0], ours.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    for name in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match=rf"{name}\(\) got an invalid PeftModel instance; prefix tuning"):
            getattr(prefixed, name)()
    assert prefixed.targeted_module_names == []
    mixed = ours.get_peft_model(Net(), ours.LoraConfig(r=2, target_modules=["first"]), mixed=True)
    for name in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match=f"{name} is not supported for PeftMixedModel"):
            getattr(mixed, name)()
    unloaded = ours.get_peft_model(Net(), ours.LoraConfig(r=2, target_modules=["first"]))
    unloaded.unload()
    assert unloaded.targeted_module_names == []
