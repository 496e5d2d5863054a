"""VeRA and RandLoRA without their random matrices in the file (`save_projection=False`), both ways beside PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery.peft as ours
from surgery import SurgeryError, load_adapter
from tests.support.peers import peft

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 3}),
    "sparse": ("RandLoraConfig", {"r": 3, "sparse": True}),
}
LIBRARIES: dict[str, Any] = {"peft": peft, "surgery": ours}
X = torch.linspace(-1, 1, 30).view(3, 10)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)).eval()


def adapted(library: Any, method: str, targets: list[str]) -> Any:
    kind, fields = METHODS[method]
    config = getattr(library, kind)(
        target_modules=targets, save_projection=False, init_weights=False, projection_prng_key=7, **fields
    )
    return library.get_peft_model(net(), config).eval()


@pytest.mark.parametrize("targets", [["2"], ["0", "2", "4"]], ids=["one size", "sizes"])
@pytest.mark.parametrize("writer", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_files_without_projections_cross_both_ways(
    method: str, writer: str, targets: list[str], tmp_path: Path
) -> None:
    library = LIBRARIES[writer]
    model = adapted(library, method, targets)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 3)
    expected = model(X)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file and not any("_A" in key or "_B" in key for key in file)
    assert library.get_peft_model_state_dict(model).keys() == file.keys()
    for reader in LIBRARIES.values():
        read = reader.PeftModel.from_pretrained(net(), tmp_path).eval()
        assert torch.equal(read(X), expected) and read.peft_config["default"].save_projection is False
    load_adapter(plain := net(), tmp_path)
    assert torch.equal(plain(X), expected)
    other = adapted(ours, method, targets)
    assert ours.set_peft_model_state_dict(other, file) == ([], [])
    assert torch.equal(other(X), expected)


@pytest.mark.parametrize("method", METHODS)
def test_projections_that_the_key_does_not_draw_are_saved(method: str, tmp_path: Path) -> None:
    model = adapted(ours, method, ["2"])
    with torch.no_grad():
        model.get_base_model()[2].adapters.default.A.mul_(2)
    model.save_pretrained(tmp_path)
    assert any("_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for reader in LIBRARIES.values():
        assert torch.equal(reader.PeftModel.from_pretrained(net(), tmp_path).eval()(X), model(X))


def test_a_file_that_should_have_projections_and_does_not(tmp_path: Path) -> None:
    adapted(peft, "vera", ["2"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(SurgeryError, match="vera_A"):
        load_adapter(net(), tmp_path)
