"""Wrappers (checkpoint_wrapper, torch.compile, DataParallel, averages) and their segments of names: sites, files and
state dicts have the names of the model without them."""

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
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch, as it compiles
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
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """A file of the adapter from the model without a wrapper; its output, computed from the file with plain torch."""
    torch.manual_seed(3)
    model = apply_rules(net(), RULES)
    folder = save_adapter(model, tmp_path_factory.mktemp("plain"))
    held = load_file(folder / "adapter_model.safetensors")
    base, key = net(), "base_model.model.{}.lora_{}.weight"
    with torch.no_grad():
        for path in SITES:
            base.get_submodule(path).weight += held[key.format(path, "B")] @ held[key.format(path, "A")] / 2 * 8
        expected = base(X)
    return folder, expected, held


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_file_loads_into_a_wrapped_model_and_back(name: str, plain: Any, tmp_path: Path) -> None:
    folder, expected, held = plain
    bare = net()
    wrapped = WRAPPERS[name](bare)
    load_adapter(wrapped, folder)
    torch.testing.assert_close(wrapped(X), expected)
    assert {key.partition(".adapters.")[0] for key in adapter_state_dict(bare)} == SITES
    assert set(adapters(bare)["default"].sites) == SITES
    again = load_file(save_adapter(bare, tmp_path) / "adapter_model.safetensors")
    assert again.keys() == held.keys() and all(torch.equal(tensor, again[key]) for key, tensor in held.items())


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
def test_wrapped_after_the_rules(name: str, plain: Any, tmp_path: Path) -> None:
    """Names change then, and what is recorded is found all the same."""
    folder, expected, held = plain
    model = net()
    model.layers[0].up.bias.requires_grad_(False)
    before = Snapshot(model)
    load_adapter(model, folder)
    WRAPPERS[name](model)
    torch.testing.assert_close(model(X), expected)
    again = load_file(save_adapter(model, tmp_path) / "adapter_model.safetensors")
    assert again.keys() == held.keys() and all(torch.equal(tensor, again[key]) for key, tensor in held.items())
    remove(model)
    model.layers[0] = getattr(model.layers[0], "_checkpoint_wrapped_module", model.layers[0])
    model.layers[1] = getattr(model.layers[1], "_orig_mod", model.layers[1])
    model.layers[1].down = getattr(model.layers[1].down, "_checkpoint_wrapped_module", model.layers[1].down)
    found = before.differences(model)
    assert all("attributes of" in line for line in found), found  # torch.compile leaves one of its own


def given(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A state dict from elsewhere: other values, so that the live ones would show."""
    return {prefix + key: tensor * 0 + 7 for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("format", ["peft", "surgery"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_a_given_state_dict_is_what_is_saved(prefix: str, format: Any, tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    folder = save_adapter(model, tmp_path, format=format, state_dict=given(model, prefix))
    (file,) = folder.glob("*.safetensors")
    held = load_file(file)
    assert len(held) == 4 and all(bool((tensor == 7).all()) for tensor in held.values())
    found = adapter_state_dict(model, state_dict=given(model, prefix))
    assert len(found) == 4 and all(bool((tensor == 7).all()) for tensor in found.values())


def test_a_segment_inside_of_the_names(tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    wanted = {key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): t for key, t in given(model).items()}
    held = load_file(save_adapter(model, tmp_path, state_dict=wanted) / "adapter_model.safetensors")
    assert all(bool((tensor == 7).all()) for tensor in held.values())


@pytest.mark.parametrize("format", ["auto", "peft", "surgery"])
def test_a_state_dict_that_lacks_a_tensor_is_refused(format: Any, tmp_path: Path) -> None:
    model = apply_rules(net(), RULES)
    whole = given(model)
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
    held = load_file(save_adapter(model, tmp_path, state_dict=given(model, "module.")) / "adapter_model.safetensors")
    assert any(".0.module.lora_A" in key for key in held)
    assert all(bool((tensor == 7).all()) for tensor in held.values())


def test_an_average_of_the_model(plain: Any, tmp_path: Path) -> None:
    """AveragedModel holds a copy: its adapters are what is saved of it."""
    folder, expected, _ = plain
    model = net()
    load_adapter(model, folder)
    average = torch.optim.swa_utils.AveragedModel(model)
    saved = save_adapter(average.module, tmp_path)
    load_adapter(again := copy.deepcopy(net()), saved)
    torch.testing.assert_close(again(X), expected)
