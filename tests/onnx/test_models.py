"""Whole models exported with slots, run by onnxruntime beside the live model. ALL_ONNX=1: all rows (`make onnx`)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import export_onnx, using
from surgery.onnx.calls.shared_copy import traced_path
from surgery.testing import Snapshot
from tests.support import tiny
from tests.support.onnx_checks import (
    TOLERANCE,
    adapted,
    assert_near,
    assert_slots,
    assert_weights,
    by_hand,
    expected,
    feeds,
    operations,
    session,
)
from tests.support.onnx_models import ALL, ROWS, Row, one_more

pytest.importorskip("onnx")
Find = Callable[[str], Path]
FEW = ("BERT", "T5", "ResNet")  # MiniLM's is examples/ship.py
SAMPLE = ALL if os.environ.get("ALL_ONNX") else [row for row in ROWS if row.name in FEW]


def cached(model: nn.Module, example: Any, how: Any) -> Any:
    """Call the model as a file with a cache: half of the text first."""
    from surgery.onnx.calls.kv_cache_example import with_cache

    return with_cache(model, example) if how.get("cache") else example


@pytest.mark.parametrize("row", SAMPLE, ids=str)
def test_models(row: Row, tmp_path: Path, packaged: Find) -> None:
    model, example = row.prepare(*([packaged] if row.real else []))
    words = example if isinstance(example, dict) else ()
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "m.onnx", example, **{"adapters": "slots", **row.how})
    assert before.differences(model) == []
    assert report.parity is not None and report.parity.ok and report.parity.weights > 10
    own = any("prefix" in name or "prompt" in name for name in row.adapters)
    assert not any("can't be called" in notice for notice in report.parity.notices if not notice.startswith("prompt"))
    assert all(moved > 10 * TOLERANCE for moved in report.parity.moved.values()), report.parity.moved
    dims = {dim for axes in report.manifest["free"].values() for dim in axes.values()}
    assert "batch" in dims and ("past" in dims) == bool(row.how.get("cache") or "past_key_values" in words)
    if row.how.get("adapters", "slots") != "slots":
        return
    assert_slots(report.path, report.manifest, checked=not row.how.get("optimize_for"))
    if not row.how.get("optimize_for"):
        inner = r"encoder\.|EncDecAttention\.[kv]\." if "encoder_outputs" in words else "$^"  # modules of an encoder
        spared = [name for name, _ in model.named_parameters() if re.search(inner, name)]
        assert_weights(model, report.path, spared)
    run, inputs = session(report.path), report.manifest["inputs"]
    for call_inputs in (example, one_more(example)) if "past_key_values" not in words else ():
        call = cached(model, call_inputs, row.how)
        for adapter in () if own else row.adapters:
            with using(model, adapter), traced_path():
                assert_near(
                    run.run(None, {**feeds(model, call, inputs), **by_hand(model, adapter)}), expected(model, call)
                )
        with using(model, []), traced_path():
            assert_near(run.run(None, feeds(model, call, inputs)), expected(model, call))


def test_merged_is_the_bases_own_graph(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "ViT")
    model, example = row.prepare()
    base, _ = row.build()
    export_onnx(model, tmp_path / "merged.onnx", example)
    export_onnx(base.eval(), tmp_path / "base.onnx", example, verify=False)
    assert operations(tmp_path / "merged.onnx") == operations(tmp_path / "base.onnx")


FUSED = {
    "BERT": (tiny.bert, ["query", "value"], {"SkipLayerNormalization": 4, "BiasGelu": 2}),
    "Llama": (
        tiny.llama, ["q_proj", "v_proj"],
        {"GroupQueryAttention": 2, "RotaryEmbedding": 4, "SkipSimplifiedLayerNormalization": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED if os.environ.get("ALL_ONNX") else ["Llama"])
def test_onnxruntimes_own_operations_with_slots(name: str, tmp_path: Path) -> None:
    build, targets, wanted = FUSED[name]
    model, example = build()
    adapted(model, targets, 3)
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots", optimize_for="ort")
    assert report.parity is not None and report.parity.ok
    fused = Counter(kind for domain, kind in operations(report.path).elements() if domain == "com.microsoft")
    fused.pop("FusedMatMul", None)  # of the slots
    assert fused == wanted
    overridable = {node.name for node in session(report.path).get_overridable_initializers()}
    assert overridable == {slot["name"] for slot in report.manifest["slots"]} and len(overridable) == 8


def test_a_cache_that_begins_empty_serves_a_whole_text(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "Llama")
    model, example = row.prepare()
    adapter = next(iter(row.adapters))
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots", cache=True)
    assert report.parity is not None and {comparison.adapter for comparison in report.parity.decoded} == {
        "base",
        *row.adapters,
    }
    assert any("past 0" in comparison.sizes for comparison in report.parity.compared)
    run = session(report.path)
    ids = torch.randint(3, 90, (2, 6))
    with using(model, adapter), torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    slots = by_hand(model, adapter)
    shape = {node.name: node.shape for node in run.get_inputs()}
    past = {
        name: torch.zeros(2, shape[name][1], 0, shape[name][3]).numpy()
        for name in report.manifest["inputs"] if name.startswith("past_key_values")
    }  # fmt: skip
    outputs = report.manifest["outputs"]
    for start, end in ((0, 4), (4, 5), (5, 6)):  # a text, then token by token
        call = {"input_ids": ids[:, start:end].numpy(), "attention_mask": torch.ones(2, end, dtype=torch.long).numpy()}
        results = dict(zip(outputs, run.run(None, {**call, **past, **slots}), strict=True))
        assert_near([results["logits"]], [wanted[:, start:end]])
        past = {entry["past"]: results[entry["present"]] for entry in report.manifest["cache"]}
