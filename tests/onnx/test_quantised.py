"""Exported files of models with quantised Linears: they have the dequantised weights, and slots for adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from surgery import SurgeryError, apply_rules, export_onnx, packed_weight_of
from surgery.onnx import OnnxRunner
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.packed_layers import QuantLinear
from tests.support.quantised import BACKENDS, BY_NAME, QuantisedLinear

pytestmark = pytest.mark.usefixtures("quiet")


class Model(nn.Module):
    def __init__(self, backend: QuantisedLinear):
        super().__init__()
        try:
            self.up, self.down = backend.build(nn.Linear(64, 96)), backend.build(nn.Linear(96, 32, bias=False))
        except ImportError as error:
            pytest.skip(f"needs {backend.package}: {error}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def build(name: str) -> Model:
    return Model(BY_NAME[name]).eval()


def run(runner: OnnxRunner, x: torch.Tensor) -> np.ndarray:
    (output,) = runner.run({"x": x.numpy()}).values()
    return output


def test_slots_over_four_bits(tmp_path: Path) -> None:
    model, x = build("bitsandbytes Linear4bit nf4, double"), torch.randn(5, 64)
    base = model(x).detach()
    apply_rules(model, LoraRule(["up", "down"], rank=4, init="random"), adapter="a")
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")  # compares the file with the live model
    assert before.differences(model) == [] and not report.notices
    packed = packed_weight_of(model.up)
    assert packed is not None
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    weight = packed.dequantise().numpy()
    assert any(w.shape in (weight.shape, weight.T.shape) and (w == weight).all() for w in stored.values())
    runner = OnnxRunner(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(runner, x), base.numpy(), atol=2e-5)
    parity = report.parity
    assert (
        parity is not None
        and parity.ok
        and {compared.adapter for compared in parity.compared} == {"base", "a"}
        and parity.moved["a"] > 0.1
    )


def test_codes_and_scales_in_the_file(tmp_path: Path) -> None:
    model, x = build("torchao int4, blocks of 32"), torch.randn(5, 64)
    apply_rules(model, LoraRule("up", rank=4, init="random"))
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", weights="packed")
    assert report.parity is not None and report.parity.ok and not report.notices
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert "up.weight" not in kinds and kinds["up.weight.codes"] == onnx.TensorProto.INT4
    assert [node.op_type for node in graph.node].count("DequantizeLinear") == 2
    only = export_onnx(model, tmp_path / "merged.onnx", x, weights="packed")
    assert only.notices == ["up.weight stay plain numbers in the file"]
    with pytest.raises(SurgeryError, match="opset"):
        export_onnx(model, tmp_path / "m.onnx", x, weights="packed", opset=18)


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_affine_codes_are_the_dequantised_weight(name: str) -> None:
    packed = packed_weight_of(build(name).up)
    assert packed is not None
    codes = packed.affine()
    assert (codes is None) == any(word in name for word in ("nf4", "fp4", "float8"))
    if codes is not None:
        assert torch.equal(codes.values(), packed.dequantise())
        assert codes.codes.shape[1] == codes.block * codes.scales.shape[1]


def test_a_module_that_rounds_its_inputs(tmp_path: Path) -> None:
    model, x = build("bitsandbytes Linear8bitLt"), torch.randn(5, 64)
    apply_rules(model, LoraRule(["up", "down"], rank=4, init="random", dora=True))
    live = model(x).detach()
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="constant")
    (notice,) = report.notices
    assert "up, down quantise their inputs (int8, one scale for each row)" in notice
    y = torch.from_numpy(run(OnnxRunner(tmp_path / "m.onnx"), x))
    assert 1e-4 < (y - live).norm() / live.norm() < 3e-2  # 8 bits an input, in two layers
    model.train()  # the library's own kernel leaves inputs as they are in training
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=2e-5)


def test_codes_whose_scales_are_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(QuantLinear(nn.Linear(64, 32)), nn.Linear(32, 8)).eval(), torch.randn(5, 64)
    report = export_onnx(model, tmp_path / "m.onnx", x, weights="packed")
    assert report.parity is not None and report.parity.ok and not report.notices
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("DequantizeLinear") == 1 and "Cast" in kinds  # the bias is in half precision, too
