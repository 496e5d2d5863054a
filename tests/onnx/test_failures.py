"""Failed exports: the error names the step, the operation and the remedy."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx: Any = pytest.importorskip("onnx", reason="reads files")
pytest.importorskip("onnxruntime", reason="runs files")

from surgery import SurgeryError, apply_rules, export_onnx, route  # noqa: E402
from surgery.onnx import OnnxRunner, export_adapter  # noqa: E402
from surgery.rules import LoraRule  # noqa: E402


class Then(nn.Module):
    def __init__(self, then: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.then = nn.Linear(4, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("cumprod", lambda x: x.cumprod(1)),
        ("cdist", lambda x: torch.cdist(x, x)),
        ("median", lambda x: x.median(1)[0]),
    ],
)
def test_a_missing_operation_is_named_with_its_place(name: str, then: Any, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError) as caught:
        export_onnx(Outer(Then(then)), tmp_path / "m.onnx", torch.randn(3, 4))
    error = caught.value
    assert "writing the traced graph as ONNX failed" in error.what
    assert f"no ONNX operation for {name}" in str(error.why) and name in str(error.fix)
    assert str(error.where).startswith("inner, test_failures.py:") and "\x1b" not in str(error)
    assert list(tmp_path.iterdir()) == []


def test_branches_on_values_say_what_to_write_instead(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"tracing by torch.export failed(.|\n)*torch.where") as caught:
        export_onnx(Then(lambda x: x if x.sum() > 0 else -x), tmp_path / "m.onnx", torch.randn(3, 4))
    assert "test_failures.py" in str(caught.value.where)


def _red() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter="red")


def test_threads_export_one_after_the_other(tmp_path: Path) -> None:
    model, failures = _red(), list[BaseException]()

    def export(index: int) -> None:
        try:
            export_onnx(model, tmp_path / f"{index}.onnx", torch.ones(3, 4))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=export, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(list(tmp_path.glob("*.onnx"))) == 3


def test_inside_a_route_block_the_file_is_of_the_model_outside(tmp_path: Path) -> None:
    model = _red()
    with route(model, ["red", None, "red"]):
        report = export_onnx(model, tmp_path / "m.onnx", torch.ones(3, 4))
    assert [note for note in report.notices if "route" in note and "(red)" in note]


@pytest.mark.parametrize(("code", "words"), [(errno.EFBIG, "no file so large"), (errno.ENOSPC, "free space")])
def test_what_the_disk_refuses(code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(SurgeryError, match=rf"can't be written(.|\n)*{words}"):
        export_onnx(_red(), tmp_path / "m.onnx", torch.ones(3, 4))
    assert list(tmp_path.iterdir()) == []


# Files that another program rewrote -------------------------------------------------------------------------------


def test_a_file_in_half_precision_takes_its_adapters(tmp_path: Path) -> None:
    float16: Any = pytest.importorskip("onnxruntime.transformers.float16", reason="converts files")
    model, x = _red(), torch.randn(3, 4)
    export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    export_adapter(model, "red", tmp_path / "m.onnx", tmp_path / "red.onnx_adapter")
    half = float16.convert_float_to_float16(onnx.load(tmp_path / "m.onnx"))
    onnx.save(half, tmp_path / "half.onnx")
    runner = OnnxRunner(tmp_path / "half.onnx")
    runner.load("red", tmp_path / "red.onnx_adapter")
    (output,) = runner.run({"input": x.numpy().astype(np.float16)}, "red").values()
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-2, atol=1e-2)  # three digits of float16
    with pytest.raises(SurgeryError, match=r"too large for the file(.|\n)*float16"):
        tensors = {name: np.full([size or 2 for size in slot.shape], 1e6, np.float32) for name, slot in _slots(runner)}
        runner.load("large", tensors)
    assert runner.adapters == ("red",)


def _slots(runner: OnnxRunner) -> Any:
    return runner.manifest.by_name.items()


def test_lost_slots_name_the_export_that_keeps_them(tmp_path: Path) -> None:
    export_onnx(_red(), tmp_path / "m.onnx", torch.ones(3, 4), adapters="slots")
    slim = onnx.load(tmp_path / "m.onnx")
    names = {initializer.name for initializer in slim.graph.initializer}
    remaining = [value for value in slim.graph.input if value.name not in names]  # as programs do that shrink files
    del slim.graph.input[:]
    slim.graph.input.extend(remaining)
    onnx.save(slim, tmp_path / "slim.onnx")
    with pytest.raises(SurgeryError, match='lost its slots(.|\n)*slots_as="inputs"'):
        OnnxRunner(tmp_path / "slim.onnx")
