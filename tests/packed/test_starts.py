"""Starts that read a quantised weight: PiSSA and OLoRA of the dequantised weight, and LoftQ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery import (
    MergeError,
    PackedWeight,
    PlanError,
    RuleError,
    SurgeryError,
    apply_rules,
    load_adapter,
    packed_weight_of,
    remove,
    save_adapter,
)
from surgery.arithmetic.exact_fold import LowRank, folded_value
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.quantised import BACKENDS, BY_NAME, QuantisedLinear

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:.*no gradient passes through the kernels"),
]
NF4, INT8 = "bitsandbytes Linear4bit nf4, double", "bitsandbytes Linear8bitLt"
every_layout = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def build(backend: QuantisedLinear | str) -> tuple[Any, Tensor]:
    """A model with one quantised Linear, and its weight before it was quantised."""
    backend = BY_NAME[backend] if isinstance(backend, str) else backend
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    original = linear.weight.detach().clone()
    try:
        return nn.ModuleDict({"layer": backend.build(linear)}), original
    except ImportError as error:
        pytest.skip(f"needs {backend.package}: {error}")


def packed_of(model: Any) -> PackedWeight:
    packed = packed_weight_of(model["layer"])
    assert packed is not None
    return packed


def bits(model: Any) -> list[Tensor]:
    return [tensor.detach().flatten().view(torch.uint8).clone() for tensor in packed_of(model).tensors().values()]


def product(model: Any) -> Tensor:
    params = model["layer"].adapters.default
    return (params.B @ params.A * 2.0).detach()  # alpha 8, rank 4


def saved(original: Tensor, folder: Path) -> str:
    save_file({"model.layer.weight": original, "model.other.weight": torch.zeros(2)}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@every_layout
def test_the_rest_is_quantised_anew_and_the_codes_come_back(backend: QuantisedLinear, init: str) -> None:
    model, _ = build(backend)
    before, old, weight = Snapshot(model), bits(model), packed_of(model).dequantise()
    apply_rules(model, LoraRule("layer", rank=4, init=init))
    change = product(model)
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        torch.testing.assert_close(change, u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-4)
    params, other = model["layer"].adapters.default, packed_of(build(backend)[0])
    residual = folded_value(weight, LowRank(params.B.detach(), params.A.detach(), -2.0))
    torch.testing.assert_close(residual, weight - change, rtol=1e-4, atol=1e-6)
    assert torch.equal(packed_of(model).dequantise(), other.rounded(residual))
    rest, lost = weight - change, packed_of(model).dequantise().float() - (weight - change)
    assert 0 < lost.norm() < 0.2 * rest.norm()
    model["layer"](torch.randn(2, 64))
    remove(model)
    assert before.differences(model) == [] and all(map(torch.equal, bits(model), old))


@every_layout
def test_loftq_falls_step_by_step(backend: QuantisedLinear, tmp_path: Path) -> None:
    _, original = build(backend)
    folder, errors = saved(original, tmp_path), []
    for steps in range(1, 5):
        model, _ = build(backend)
        before, old = Snapshot(model), bits(model)
        lost = original - packed_of(model).dequantise().float()
        apply_rules(model, LoraRule("layer", rank=4, init="loftq", loftq_base=folder, loftq_steps=steps))
        kept = packed_of(model).dequantise().float()
        errors.append(float((original - kept - product(model)).norm()))
        if steps == 1:  # the codes stay; B A is the best approximation of what they lost
            assert all(map(torch.equal, bits(model), old))
            u, s, vh = torch.linalg.svd(lost, full_matrices=False)
            torch.testing.assert_close(product(model), u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
            assert errors[0] < lost.norm()
        remove(model)
        assert before.differences(model) == [] and all(map(torch.equal, bits(model), old))
    # float32 sums of 2,048 squares: the same error may differ in the last bits.
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(errors, errors[1:], strict=False))


def test_loftq_in_four_bits_gains_by_its_steps(tmp_path: Path) -> None:
    _, original = build(NF4)
    folder, errors = saved(original, tmp_path), []
    for steps in (1, 3):
        model, _ = build(NF4)
        apply_rules(model, LoraRule("layer", rank=8, alpha=8, init="loftq", loftq_base=folder, loftq_steps=steps))
        params = model["layer"].adapters.default
        change = (params.B @ params.A).detach()
        errors.append(float((original - packed_of(model).dequantise().float() - change).norm()))
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_training_save_and_load(steps: int, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model, original = build(NF4)
    chosen = LoraRule(
        "layer", rank=8, alpha=8, init="loftq", loftq_base=saved(original, tmp_path / "base"), loftq_steps=steps
    )
    apply_rules(model, chosen)
    x, layer = torch.randn(3, 64), model["layer"]
    params = layer.adapters.default
    expected = F.linear(x, packed_of(model).dequantise() + params.B @ params.A, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).square().mean().backward()
    torch.optim.SGD([params.A, params.B], lr=0.1).step()
    twin = copy.deepcopy(model)
    assert torch.equal(twin["layer"](x), layer(x))
    save_adapter(model, tmp_path / "own", format="surgery")
    other, _ = build(NF4)
    load_adapter(other, tmp_path / "own")
    assert torch.equal(other["layer"](x), layer(x))
    if steps == 1:  # the base is as it was, so the file is an ordinary LoRA
        save_adapter(model, tmp_path / "peft", format="peft")
        assert "base" not in (tmp_path / "peft" / "adapter_config.json").read_text().replace("base_model", "")
        other, _ = build(NF4)
        load_adapter(other, tmp_path / "peft")
        assert torch.equal(other["layer"](x), layer(x))
    else:
        with pytest.raises(SurgeryError, match="several steps"):
            save_adapter(model, tmp_path / "peft", format="peft")
    remove(twin)
    assert all(map(torch.equal, bits(twin), bits(build(NF4)[0])))


def test_codes_that_changed_since_are_not_overwritten() -> None:
    model, _ = build(NF4)
    apply_rules(model, LoraRule("layer", rank=4, init="pissa"))
    packed = packed_of(model)
    packed.write(packed.requantise(torch.randn(32, 64)))
    with pytest.raises(MergeError, match="codes changed since"):
        remove(model)
    remove(model, check=False)
    assert all(map(torch.equal, bits(model), bits(build(NF4)[0])))


def test_what_can_not_be_started(tmp_path: Path) -> None:
    model, original = build(NF4)
    before = Snapshot(model)
    with pytest.raises(RuleError, match="loftq_base"):
        LoraRule("layer", init="loftq")
    with pytest.raises(RuleError, match="loftq_base"):
        LoraRule("layer", loftq_base="folder")
    folder = saved(original[:16], tmp_path)
    for where, says in ((str(tmp_path / "none"), "no safetensors files"), (folder, r"sizes \(16, 64\)")):
        with pytest.raises(PlanError, match=says):
            apply_rules(model, LoraRule("layer", rank=4, init="loftq", loftq_base=where))
    with pytest.raises(PlanError, match="no quantised weight"):
        apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2, init="loftq", loftq_base=folder))
    assert before.differences(model) == []
