"""The lines of the table on exported models: what slots cost in onnxruntime, and what an export takes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from surgery import apply_rules, export_onnx
from surgery.onnx import OnnxRunner, export_adapter
from surgery.rules import LoraRule
from tests.benchmarks import models
from tests.benchmarks.lines import Row, bases
from tests.benchmarks.models import twin
from tests.benchmarks.timing import Setting, collected, interleaved, once


def onnx(setting: Setting) -> Iterator[Row]:
    tokens = 8 if setting.quick else 64
    for name, base in bases(setting, models.minilm, models.llama):
        base.eval()
        config: Any = base.config
        config.use_cache = False
        inputs = {"input_ids": torch.randint(0, 1000, (1, tokens))}
        model = apply_rules(twin(base), [LoraRule("all-linear", rank=8, init="random")], adapter="a").eval()
        with TemporaryDirectory() as folder:
            yield from _rows(setting, name, base, model, inputs, Path(folder), tokens)


def _rows(
    setting: Setting, name: str, base: nn.Module, model: nn.Module, inputs: dict[str, Any], folder: Path, tokens: int
) -> Iterator[Row]:
    files = {kind: folder / f"{kind}.onnx" for kind in ("base", "merged", "slots")}
    export_onnx(base, files["base"], inputs, verify=False)
    export_onnx(model, files["merged"], inputs, adapters="merged", verify=False)
    export_onnx(model, files["slots"], inputs, adapters="slots", verify=False)
    file = export_adapter(model, "a", files["slots"], folder / "a.onnx_adapter")
    runners = {kind: OnnxRunner(path, threads=1) for kind, path in files.items()}
    runners["slots"].load("a", file)
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    works: dict[str, Callable[[], Any]] = {kind: partial(runner.run, arrays) for kind, runner in runners.items()}
    works["adapter"] = partial(runners["slots"].run, arrays, "a")
    times = interleaved(setting, works)
    for kind, label, aim in (
        ("merged", "merged", 1.0),
        ("slots", "slots, no adapter", 1.05),
        ("adapter", "slots, rank 8 on all linears", 1.12),
    ):
        yield Row(f"onnxruntime, {tokens} tokens, {label}: {name}", "base's file", aim, times.ratio(kind, "base"))
    runner = runners["slots"]
    loading = interleaved(setting, {"load": partial(runner.load, "b", file, replace=True)})
    yield Row(f"onnxruntime, milliseconds to load an adapter: {name}", "", 1.0, 1e3 * loading.seconds("load"))
    picking = interleaved(setting, {"pick": partial(runner.slot_values, "a")})
    yield Row(
        f"onnxruntime, milliseconds to pick an adapter for a call: {name}", "", 0.1, 1e3 * picking.seconds("pick")
    )
    sizes = {kind: path.stat().st_size for kind, path in files.items()}
    yield Row(f"size of the file with slots: {name}", "base's file", 1.01, sizes["slots"] / sizes["base"])
    exports = {"ours": partial(_export, model, folder), "torch": partial(_export_base, base, folder)}
    spent = collected(
        exports, 1 if setting.quick else min(3, setting.rounds), lambda kind: once(partial(exports[kind], inputs))
    )
    work = f"exporting with slots, seconds of torch.onnx.export of the base {spent.seconds('torch'):.1f}: {name}"
    yield Row(work, "torch.onnx.export", 1.3, spent.ratio("ours", "torch"))


def _export(model: nn.Module, folder: Path, inputs: dict[str, Any]) -> None:
    export_onnx(model, folder / "timed.onnx", inputs, adapters="slots", verify=False)


def _export_base(base: nn.Module, folder: Path, inputs: dict[str, Any]) -> None:
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    two = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(base, (), kwargs=two, dynamic_shapes=free, dynamo=True, verbose=False)
        assert program is not None
        program.save(folder / "torch.onnx")


LINES: dict[str, Callable[[Setting], Iterator[Row]]] = {"onnx": onnx}
