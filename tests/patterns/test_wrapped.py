"""Wrappers (checkpoint_wrapper, torch.compile, DataParallel, averages) and their name segments.

Sites, files and state dicts use the names of the model without wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from surgery import (
    SurgeryError,
    activate,
    adapter_state_dict,
    adapters,
    apply_rules,
    base_state_dict,
    deactivate,
    load_adapter,
    merge,
    remove,
    save_adapter,
    show,
    unmerge,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot

load_file: Any = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # a warning during compilation
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
RULES = [LoraRule(["layers.0.up", "re:layers\\.1\\.down"], rank=2, init="random")]
SITES = {"layers.0.up", "layers.1.down"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net() -> Any:
    torch.manual_seed(0)
    return Net()


def checkpointed(model: Any) -> Any:
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1].down = checkpoint_wrapper(model.layers[1].down)
    return model


def compiled_inside(model: Any) -> Any:
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


def doubly(model: Any) -> Any:
    compiled: Any = torch.compile(checkpointed(model), backend="eager")
    return nn.DataParallel(compiled)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "checkpointed": checkpointed,
    "a compiled layer": compiled_inside,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "three": doubly,
}


@pytest.fixture(scope="module")
def unwrapped_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """An adapter file of the model without a wrapper, and its output, computed from the file with plain torch."""
    torch.manual_seed(3)
    model = apply_rules(net(), RULES)
    folder = save_adapter(model, tmp_path_factory.mktemp("plain"))
    saved = load_file(folder / "adapter_model.safetensors")
    base, key = net(), "base_model.model.{}.lora_{}.weight"
    with torch.no_grad():
        for path in SITES:
            base.get_submodule(path).weight += saved[key.format(path, "B")] @ saved[key.format(path, "A")] / 2 * 8
        expected = base(X)
    return folder, expected, saved


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_file_loads_into_a_wrapped_model_and_back(name: str, unwrapped_file: Any, tmp_path: Path) -> None:
    folder, expected, saved = unwrapped_file
    bare = net()
    wrapped = WRAPPERS[name](bare)
    load_adapter(wrapped, folder)
    torch.testing.assert_close(wrapped(X), expected)
    assert {key.partition(".adapters.")[0] for key in adapter_state_dict(bare)} == SITES
    assert set(adapters(bare)["default"].sites) == SITES
    again = load_file(save_adapter(bare, tmp_path) / "adapter_model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(tensor, again[key]) for key, tensor in saved.items())


@pytest.mark.parametrize("name", WRAPPERS)
def test_rules_and_their_way_back_around_a_wrapper(name: str) -> None:
    bare = net()
    bare.layers[0].up.bias.requires_grad_(False)
    wrapped = WRAPPERS[name](bare)
    flags = [p.requires_grad for p in wrapped.parameters()]
    keys, before = list(wrapped.state_dict()), wrapped(X)
    torch.manual_seed(3)
    apply_rules(wrapped, RULES)
    assert not torch.equal(wrapped(X), before)
    assert not torch.equal(wrapped(X), deactivate(bare)(X))
    activate(bare)
    assert show(bare, "layers.0.up").startswith("# layers.0.up: Linear + LoraRule")
    assert list(base_state_dict(bare)) == [key for key in bare.state_dict() if ".adapters." not in key]
    merge(bare)
    unmerge(bare)
    remove(bare)
    assert torch.equal(wrapped(X), before) and list(wrapped.state_dict()) == keys
    assert [p.requires_grad for p in wrapped.parameters()] == flags


@pytest.mark.parametrize("name", ["checkpointed", "a compiled layer"])
def test_wrapped_after_the_rules(name: str, unwrapped_file: Any, tmp_path: Path) -> None:
    """Parameter names change, and the records still find their modules."""
    folder, expected, saved = unwrapped_file
    model = net()
    model.layers[0].up.bias.requires_grad_(False)
    before = Snapshot(model)
    load_adapter(model, folder)
    WRAPPERS[name](model)
    torch.testing.assert_close(model(X), expected)
    again = load_file(save_adapter(model, tmp_path) / "adapter_model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(tensor, again[key]) for key, tensor in saved.items())
    remove(model)
    model.layers[0] = getattr(model.layers[0], "_checkpoint_wrapped_module", model.layers[0])
    model.layers[1] = getattr(model.layers[1], "_orig_mod", model.layers[1])
    model.layers[1].down = getattr(model.layers[1].down, "_checkpoint_wrapped_module", model.layers[1].down)
    differences = before.differences(model)
    assert all("attributes of" in line for line in differences), differences  # torch.compile adds its own


def changed_state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Pass a state dict with other values, which differ from the live values."""
    return {prefix + key: tensor * 0 + 7 for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("format", ["peft", "surgery"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_a_given_state_dict_is_what_is_saved(prefix: str, format: Any, tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    folder = save_adapter(model, tmp_path, format=format, state_dict=changed_state(model, prefix))
    (file,) = folder.glob("*.safetensors")
    saved = load_file(file)
    assert len(saved) == 4 and all(bool((tensor == 7).all()) for tensor in saved.values())
    state = adapter_state_dict(model, state_dict=changed_state(model, prefix))
    assert len(state) == 4 and all(bool((tensor == 7).all()) for tensor in state.values())


def test_a_segment_inside_of_the_names(tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    wrapped_state = {
        key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): t for key, t in changed_state(model).items()
    }
    saved = load_file(save_adapter(model, tmp_path, state_dict=wrapped_state) / "adapter_model.safetensors")
    assert all(bool((tensor == 7).all()) for tensor in saved.values())


@pytest.mark.parametrize("format", ["auto", "peft", "surgery"])
def test_a_state_dict_that_lacks_a_tensor_is_refused(format: Any, tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    whole = changed_state(model)
    lacking = {key: tensor for key, tensor in whole.items() if not key.endswith("adapters.default.B")}
    for wrong in ({}, lacking, {"other." + key: tensor for key, tensor in whole.items()}, base_state_dict(model)):
        with pytest.raises(SurgeryError, match=r"lacks \d tensors of the adapter, such as layers.0.up.adapters"):
            save_adapter(model, tmp_path / "x", format=format, state_dict=wrong)
        assert not (tmp_path / "x").exists()
    twice = {"module." + key: tensor for key, tensor in whole.items()} | {
        "_orig_mod." + key: tensor for key, tensor in whole.items()
    }
    with pytest.raises(SurgeryError, match="lacks 4 tensors"):
        save_adapter(model, tmp_path / "x", format=format, state_dict=twice)


def test_a_child_that_is_called_module_is_not_a_wrapper(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = apply_rules(nn.Sequential(Holder(), nn.Linear(4, 4)), [LoraRule("all-linear", rank=2)])
    assert set(adapters(model)["default"].sites) == {"0.module", "1"}
    saved = load_file(
        save_adapter(model, tmp_path, state_dict=changed_state(model, "module.")) / "adapter_model.safetensors"
    )
    assert any(".0.module.lora_A" in key for key in saved)
    assert all(bool((tensor == 7).all()) for tensor in saved.values())


def test_an_average_of_the_model(unwrapped_file: Any, tmp_path: Path) -> None:
    """AveragedModel contains a copy: saving it saves the copy's adapters."""
    folder, expected, _ = unwrapped_file
    model = net()
    load_adapter(model, folder)
    average = torch.optim.swa_utils.AveragedModel(model)
    saved = save_adapter(average.module, tmp_path)
    load_adapter(again := copy.deepcopy(net()), saved)
    torch.testing.assert_close(again(X), expected)
