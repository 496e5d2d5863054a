"""Slots as required inputs: their values without an adapter are in a file beside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery import LoadError, SurgeryError, apply_rules, deactivate
from surgery.rules import LoraRule, TrainRule

pytest.importorskip("onnxscript")
onnxruntime: Any = pytest.importorskip("onnxruntime")


def export_net(folder: Path, slots_as: Any = "inputs", **how: Any) -> tuple[nn.Module, torch.Tensor, Any]:
    from surgery import export_onnx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    apply_rules(model, [LoraRule("0", rank=2, init="random"), TrainRule("2")], adapter="red")
    with torch.no_grad():
        model.get_submodule("2.adapters.red").weight.add_(1.0)  # type: ignore[union-attr]
    return model, x, export_onnx(model, folder / "m.onnx", x, adapters="slots", slots_as=slots_as, **how)


@pytest.mark.parametrize("empty", ["rank0", "zeros1"])
def test_the_base_runs_from_the_file_beside(empty: Any, tmp_path: Path) -> None:
    from surgery.onnx import OnnxRunner, export_adapter, read_adapter

    model, x, report = export_net(tmp_path, empty=empty)
    assert report.parity.ok and {comparison.adapter for comparison in report.parity.compared} == {"base", "red"}
    file = tmp_path / "m.onnx.defaults.onnx_adapter"
    runner = OnnxRunner(report.path)
    arrays = read_adapter(file, runner.manifest)
    assert set(arrays) == {slot.name for slot in runner.manifest.slots}
    linear: Any = model[2]  # type: ignore[index]
    assert np.array_equal(arrays["2.adapters.slot.weight"], linear.weight.detach().numpy())
    runner.load("red", export_adapter(model, "red", report.path, tmp_path / "red.onnx_adapter"))
    feeds = {"input": x.numpy()}
    red = model(x).detach().numpy()
    base = deactivate(model)(x).detach().numpy()
    assert np.abs(red - base).max() > 0.1
    np.testing.assert_allclose(runner.run(feeds, "red")["output"], red, atol=1e-5)
    np.testing.assert_allclose(runner.run(feeds)["output"], base, atol=1e-5)
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert not session.get_overridable_initializers()  # as runtimes do that feed only required inputs
    np.testing.assert_allclose(session.run(None, {**arrays, **feeds})[0], base, atol=1e-5)


def test_without_that_file_it_needs_an_adapter(tmp_path: Path) -> None:
    from surgery.onnx import OnnxRunner

    _, x, report = export_net(tmp_path)
    file = tmp_path / "m.onnx.defaults.onnx_adapter"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(SurgeryError, match="m.onnx.defaults.onnx_adapter, which is missing"):
        OnnxRunner(report.path).run({"input": x.numpy()})
    file.write_bytes(content[:-4])
    with pytest.raises(LoadError, match="damaged"):
        OnnxRunner(report.path)


def test_none_is_written_where_slots_are_optional_and_an_old_one_goes(tmp_path: Path) -> None:
    export_net(tmp_path, verify=False)
    export_net(tmp_path, slots_as="overridable", verify=False)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.manifest.json"}
