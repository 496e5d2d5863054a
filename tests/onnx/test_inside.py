"""Exports modules that contain a rewritten model: adapters are chosen, folded and fed as for the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from surgery import (
    SurgeryError,
    activate,
    active,
    adapters,
    apply_rules,
    deactivate,
    export_onnx,
    merge,
    route,
    using,
    verify_onnx,
)
from surgery.onnx import OnnxRunner, export_adapter
from surgery.rules import LoraRule


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def build_adapted() -> nn.Sequential:
    model = apply_rules(body(), LoraRule(["0", "2"], rank=2, init="random"), adapter="red")
    return apply_rules(model, LoraRule("0", rank=4, init="random"), adapter="blue").eval()


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


AROUND: dict[str, Callable[[nn.Module], Any]] = {
    "module": Around,
    "compile": lambda inner: torch.compile(inner, backend="eager"),
    "DataParallel": nn.DataParallel,
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def run_file(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]  # type: ignore[return-value]


def live(outer: Any, *names: str) -> np.ndarray:
    with using(outer, list(names)), torch.no_grad():
        return outer(X).numpy()


@pytest.mark.parametrize("kind, how", [(kind, "merged") for kind in AROUND] + [("module", "constant")])
def test_names_are_heard(kind: str, how: Any, tmp_path: Path) -> None:
    outer = AROUND[kind](build_adapted()).eval()
    for names, wanted in (("red", ["red"]), (None, ["red", "blue"])):
        report = export_onnx(outer, tmp_path / "a.onnx", X, adapters=how, names=names, dynamic=False, verify=False)
        # float32 sums of numbers of this size in another order
        np.testing.assert_allclose(run_file(report.path), live(outer, *wanted), atol=1e-5)
        assert (how == "merged") != any(".adapters." in name for name in weights(report.path))
    assert verify_onnx(report.path, outer, X).ok
    with pytest.raises(SurgeryError, match="no adapter 'nonsense'"):
        export_onnx(outer, tmp_path / "b.onnx", X, adapters=how, names="nonsense")
    assert not (tmp_path / "b.onnx").exists()


def weights(path: Path) -> list[str]:
    import onnx

    return [initializer.name for initializer in onnx.load(str(path)).graph.initializer]


@pytest.mark.parametrize("kind", ["module", "compile"])
def test_slots(kind: str, tmp_path: Path) -> None:
    outer = AROUND[kind](build_adapted()).eval()
    report = export_onnx(outer, tmp_path / "a.onnx", X, adapters="slots")
    begin = "inner." if kind == "module" else ""
    assert [slot["name"] for slot in report.manifest["slots"]][0] == f"{begin}0.adapters.slot.A"
    runner = OnnxRunner(report.path)
    for name in ("red", "blue"):
        runner.load(name, export_adapter(outer, name, report.path, tmp_path / f"{name}.onnx_adapter"))
        output = next(iter(runner.run({runner.manifest.inputs[0]: X.numpy()}, name).values()))
        np.testing.assert_allclose(output, live(outer, name), atol=1e-5)
    with torch.no_grad():
        plain = next(iter(runner.run({runner.manifest.inputs[0]: X.numpy()}).values()))
        np.testing.assert_allclose(plain, live(outer), atol=1e-5)


@pytest.mark.parametrize("how", ["merged", "constant"])
@pytest.mark.parametrize("names", [None, "red"])
def test_live_adapters_have_their_weights(how: Any, names: str | None, tmp_path: Path) -> None:
    outer = Around(model := build_adapted()).eval()
    activate(model, ["red", "blue"], weights := {"red": 0.25, "blue": -2.0})
    report = export_onnx(outer, tmp_path / "a.onnx", X, adapters=how, names=names, dynamic=False)
    assert active(model) == ("red", "blue") and adapters(model)["blue"].weight == -2.0
    assert report.parity is not None and report.parity.ok
    actual = run_file(report.path)
    with torch.no_grad():  # plain arithmetic
        x = X
        for layer in model:
            if isinstance(layer, nn.Linear):
                container: Any = layer.adapters
                weight = layer.weight.clone()
                for name, scale in {"red": 8 / 2, "blue": 8 / 4}.items():
                    if names in (None, name) and hasattr(container, name):
                        weight += weights[name] * scale * getattr(container, name).B @ getattr(container, name).A
                x = nn.functional.linear(x, weight, layer.bias)
            else:
                x = layer(x)
        np.testing.assert_allclose(actual, outer.out(x).numpy(), atol=1e-5)


def test_what_is_merged_or_idle_is_seen(tmp_path: Path) -> None:
    inner = build_adapted()
    outer = Around(inner).eval()
    activate(inner, "blue")
    np.testing.assert_allclose(
        run_file(export_onnx(outer, tmp_path / "a.onnx", X, dynamic=False).path), live(outer, "blue"), atol=1e-5
    )
    merge(inner, "blue")
    with torch.no_grad():
        np.testing.assert_allclose(
            run_file(export_onnx(outer, tmp_path / "b.onnx", X, dynamic=False).path), outer(X).numpy(), atol=1e-5
        )
    assert inner[0].weight.requires_grad is False


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = build_adapted(), build_adapted()

    def forward(self, x: Tensor) -> Tensor:
        return self.text(x) + 2 * self.image(x)


def test_several_rewritten_parts(tmp_path: Path) -> None:
    model = Two().eval()
    activate(model.text, "red")
    deactivate(model.image)
    copies = [tensor.clone() for tensor in model.state_dict().values()]
    with torch.no_grad():
        wanted = model(X).numpy()
    path = export_onnx(model, tmp_path / "a.onnx", X, dynamic=False).path
    np.testing.assert_allclose(run_file(path), wanted, atol=1e-5)
    assert not any(".adapters." in name for name in weights(path))
    assert all(torch.equal(a, b) for a, b in zip(copies, model.state_dict().values(), strict=True))
    for how, names in (("merged", "red"), ("constant", "red"), ("slots", None), ("slots", "red")):
        with pytest.raises(SurgeryError, match="2 parts of this Two were rewritten"):
            export_onnx(model, tmp_path / "b.onnx", X, adapters=how, names=names)  # type: ignore[arg-type]


def test_a_part_that_was_rewritten_by_itself_is_folded_too(tmp_path: Path) -> None:
    outer = Around(body()).eval()
    apply_rules(outer, LoraRule("out", rank=2, init="random"))
    apply_rules(outer.inner, LoraRule("0", rank=2, init="random"))
    with torch.no_grad():
        wanted = outer(X).numpy()
    path = export_onnx(outer, tmp_path / "a.onnx", X, dynamic=False).path
    np.testing.assert_allclose(run_file(path), wanted, atol=1e-5)
    assert not any(".adapters." in name for name in weights(path))


def test_a_block_of_route_on_the_part_is_told(tmp_path: Path) -> None:
    inner = build_adapted()
    outer = Around(inner).eval()
    with route(inner, ["red", None, "blue"]):
        report = export_onnx(outer, tmp_path / "a.onnx", X, dynamic=False, verify=False)
    assert any("routes nothing" in note for note in report.notices)
    np.testing.assert_allclose(run_file(report.path), live(outer, "red", "blue"), atol=1e-5)


def test_names_for_a_model_without_rules(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no rules were applied"):
        export_onnx(body(), tmp_path / "a.onnx", X, names="red")
    model = nn.Sequential(build_adapted())
    with pytest.raises(SurgeryError, match="a part of a rewritten model"):
        export_onnx(model[0][0], tmp_path / "a.onnx", X, names="red")  # type: ignore[index]


def test_a_part_of_a_rewritten_model(tmp_path: Path) -> None:
    whole: Any = apply_rules(nn.Sequential(body()), LoraRule("0.0", rank=2, init="random")).eval()
    part = whole[0]
    with pytest.raises(SurgeryError, match="a part of a rewritten model, and its adapters are live"):
        export_onnx(part, tmp_path / "a.onnx", X)
    with pytest.raises(SurgeryError, match="a part of a rewritten model"):
        export_onnx(part, tmp_path / "a.onnx", X, adapters="slots")
    with torch.no_grad():
        wanted = part(X).numpy()
    np.testing.assert_allclose(
        run_file(export_onnx(part, tmp_path / "b.onnx", X, adapters="constant", dynamic=False).path), wanted, atol=1e-5
    )
    merge(whole)
    np.testing.assert_allclose(
        run_file(export_onnx(part, tmp_path / "c.onnx", X, dynamic=False).path), wanted, atol=1e-5
    )
