"""`progress=` of long functions: calls of a function, a bar on a terminal alone, and nothing else."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from surgery import (
    SurgeryError,
    apply_rules,
    combine,
    load_adapter,
    load_adapters,
    merge,
    remove,
    save_adapter,
    unmerge,
)
from surgery.progress import each_step
from surgery.rules import LoraRule
from surgery.testing import Snapshot

RULE = LoraRule(["0", "1"], rank=2, init="random")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_a_function_hears_of_every_step(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []

    def listen(*call: object) -> None:
        calls.append(call)  # type: ignore[arg-type]

    net = model()
    for name in ("a", "b"):
        apply_rules(net, RULE, adapter=name, progress=listen)
    combine(net, {"a": 1, "b": 1}, "c", progress=listen)
    save_adapter(net, tmp_path / "a", "a", progress=listen)
    merge(net, "a", progress=listen)
    remove(unmerge(net))
    load_adapter(net, tmp_path / "a", progress=listen)
    load_adapters(remove(net), tmp_path, progress=listen)
    works = [("apply a", 2), ("apply b", 2), ("combine lora", 2), ("write", 4), ("merge a", 2), ("apply default", 2)]
    works.append(("apply a", 2))
    assert calls == [(what, done, total) for what, total in works for done in range(total + 1)]


def test_an_error_of_the_function_leaves_the_model_as_it_was() -> None:
    net = model()
    before = Snapshot(net)

    def fail(what: str, done: int, total: int) -> None:
        if done:
            raise InterruptedError(what)

    with pytest.raises(InterruptedError, match="apply default"):
        apply_rules(net, RULE, progress=fail)
    assert before.differences(net) == []
    before = Snapshot(apply_rules(net, RULE))
    with pytest.raises(InterruptedError, match="merge default"):
        merge(net, progress=fail)
    assert before.differences(net) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    for stream, drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        apply_rules(model(), RULE, progress=True)
        assert ("apply default" in stream.getvalue()) == drawn


def test_a_bar_ends_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    try:
        with each_step([1, 2], True, "work") as items:
            for _ in items:
                raise InterruptedError
    except InterruptedError:  # the traceback still holds the loop
        assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0, "the cursor is back"


def test_a_wrong_value_is_an_error() -> None:
    for wrong in ("yes", None, 1):
        with pytest.raises(SurgeryError, match="neither a bool nor a function"):
            apply_rules(model(), RULE, progress=wrong)  # type: ignore[arg-type]


def test_merge_to_and_export_say_what_they_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    from surgery import export_onnx, merge_to

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=8
    )
    calls: list[str] = []
    net = apply_rules(transformers.ViTForImageClassification(config).eval(), LoraRule("q_proj", rank=2))
    merge_to(net, tmp_path, progress=lambda what, done, total: calls.append(f"{what} {done}/{total}"))
    assert calls == ["merge default 0/1", "merge default 1/1", "write 0/1", "write 1/1"]
    calls.clear()
    small = apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2))
    export_onnx(small, tmp_path / "m.onnx", torch.ones(2, 4), progress=lambda *call: calls.append(str(call)))
    assert calls == [str(("export", done, 5)) for done in range(6)]


@pytest.mark.parametrize("last", range(6))
def test_an_error_of_the_function_leaves_no_exported_file(last: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from surgery import export_onnx

    def stop(what: str, done: int, total: int) -> None:
        if done == last:
            raise InterruptedError(what)

    small = apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2))
    with pytest.raises(InterruptedError):
        export_onnx(small, tmp_path / "m.onnx", torch.ones(2, 4), progress=stop)
    assert list(tmp_path.iterdir()) == []
