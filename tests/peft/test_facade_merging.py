"""Some adapters of a façade merged, beside PEFT: the others take no part in a call until they are unmerged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import surgery.peft as ours
from surgery import SurgeryWarning
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words

METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": [], "init_ia3_weights": False},
    "OFTConfig": {"oft_block_size": 4, "init_weights": False},
    "BOFTConfig": {"boft_block_size": 4, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
    "RoadConfig": {"group_size": 2, "init_weights": False},
    "ShiraConfig": {"r": 1, "init_weights": False},
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def three(library: Any, kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(library, kind)
    model = library.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config(target_modules=["0"], **METHODS[kind])).eval()
    for name in ("b", "c"):
        model.add_adapter(name, config(target_modules=["0"], **METHODS[kind]))
    return model


def alone(model: Any, name: str) -> torch.Tensor:
    active = model.active_adapter
    model.set_adapter(name)
    output = model(X)
    model.set_adapter(active)
    return output


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("library", [peft, ours], ids=["peft", "surgery"])
def test_merging_an_inactive_adapter(library: Any, kind: str) -> None:
    model = three(library, kind)
    live, only_b = model(X), alone(model, "b")
    flags = {"default": True, "b": False, "c": False}
    model.merge_adapter(["b"])
    assert model.get_model_status().requires_grad == flags
    torch.testing.assert_close(model(X), only_b, rtol=1e-4, atol=1e-5)
    (status,) = model.get_layer_status()
    assert model.active_adapters == status.active_adapters == ["default"] and status.merged_adapters == ["b"]
    copied = copy.deepcopy(model)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), live, rtol=1e-4, atol=1e-5)
    assert model.active_adapters == ["default"] and model.get_model_status().requires_grad == flags
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        copied.set_adapter("c")
    torch.testing.assert_close(copied(X), alone(model, "c"), rtol=1e-4, atol=1e-5)
    unloaded = copy.deepcopy(model).merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(unloaded(X), only_b, rtol=1e-4, atol=1e-5)
    if library is ours:
        assert torch.equal(model(X), live)


def test_merging_one_after_the_other() -> None:
    outputs = []
    for library in (peft, ours):
        model = three(library, "LoraConfig")
        base, live = model.get_base_model(), model(X)
        model.merge_adapter(["b"])
        with pytest.warns(UserWarning, match="You are now additionally merging c"):
            model.merge_adapter(["c"])
        outputs.append(model(X) - live)
        with model.disable_adapter():
            disabled = model(X)
        assert model.active_adapters == ["default"]
        torch.testing.assert_close(model(X), live)
        model.merge_adapter(["default", "b"])
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), live)
        model.disable_adapter_layers()
        torch.testing.assert_close(model(X), disabled)
        assert library is peft or torch.equal(model(X), disabled) and base is model.get_base_model()
    same = three(peft, "LoraConfig"), three(ours, "LoraConfig")
    torch.testing.assert_close(same[0](X), same[1](X))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_failed_merge_leaves_the_active_adapters() -> None:
    model = three(ours, "LoraConfig")
    live = model(X)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".b.A")).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["b"], safe_merge=True)
    assert torch.equal(model(X), live) and model.active_adapters == ["default"]
    with pytest.warns(SurgeryWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_what_a_merge_of_randlora_rounds_is_no_more_than_pefts() -> None:
    """Outputs near 2,500: float32 rounds by more than 1e-4 in both libraries, and float64 by almost nothing."""
    inputs, rounded = torch.arange(90.0).view(9, 10), {}
    for library in (peft, ours):
        torch.manual_seed(0)
        config = library.RandLoraConfig(target_modules=["0"], init_weights=False)
        model = library.get_peft_model(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)), config).eval()
        wide, expected = copy.deepcopy(model).double(), copy.deepcopy(model).double()(inputs.double())
        wide.merge_adapter()
        torch.testing.assert_close(wide(inputs.double()), expected, rtol=0, atol=1e-11)
        model.merge_adapter()
        rounded[library] = (model(inputs) - expected).abs().max()
    assert rounded[ours] <= rounded[peft] < 1e-2
