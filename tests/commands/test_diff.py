"""`surgery diff` against plain torch arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import load_adapter, save_adapter
from tests.support.command_line import Files, run


def test_norms_are_those_of_torch(files: Files, tmp_path: Path) -> None:
    model = files.load()
    weight = model.classifier.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    done = run("diff", files.model, tmp_path, "--json")
    (row,) = [row for row in done.data["tensors"] if row["status"] != "equal"]
    a, b = before.double(), weight.detach().double()
    assert done.code == 0 and row["tensor"] == "classifier.weight" and row["status"] == "different"
    assert row["norm_a"] == float(a.norm()) and row["difference"] == float((b - a).norm())
    assert row["relative"] == pytest.approx(float((b - a).norm() / a.norm()))
    assert run("diff", files.model, tmp_path, "--exit-code").code == 1
    assert run("diff", files.model, files.model, "--exit-code").code == 0
    absent = tmp_path / "absent"
    assert run("diff", files.model, absent, "--exit-code").code == 2 and run("diff", files.model, absent).code == 1


def test_one_adapter_in_two_formats_is_equal(files: Files, tmp_path: Path) -> None:
    model = files.load()
    load_adapter(model, files.peft)
    save_adapter(model, tmp_path, format="surgery", licence="apache-2.0", metadata={"accuracy": 0.9})
    done = run("diff", files.peft, tmp_path, "--json")
    assert done.data["counts"] == {"equal": 4} and set(done.data["settings"]) == {"format"}


def test_settings_and_tensors_on_one_side(files: Files, tmp_path: Path) -> None:
    model = files.load()
    load_adapter(model, files.ours, freeze=False)
    save_adapter(model, tmp_path / "a", format="surgery")
    done = run("diff", files.ours, tmp_path / "a", "--json")
    assert done.data["settings"]["licence"] == {"a": "apache-2.0", "b": None}
    tensors = load_file(files.ours / "adapter.safetensors")
    first = next(iter(tensors))
    save_file({first: tensors[first].half()}, tmp_path / "one.safetensors")
    save_file({first: tensors[first].half().float(), "new": torch.zeros(2)}, tmp_path / "two.safetensors")
    rows = {
        row["tensor"]: row
        for row in run("diff", tmp_path / "one.safetensors", tmp_path / "two.safetensors", "--json").data["tensors"]
    }
    assert rows["new"]["status"] == "only in second" and rows[first]["status"] == "other dtype"


def test_what_can_not_be_compared(files: Files, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    assert "only safetensors files are read" in run("diff", files.model, tmp_path / "x.bin").err
    assert "holds no safetensors file" in run("diff", files.model, tmp_path).err
    mixed = run("diff", files.model, files.peft, "--exit-code")
    assert mixed.code == 2 and f"{files.peft} is an adapter, and {files.model} is not" in mixed.err


def test_long_tables_are_cut(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({f"w{i}": torch.full((2,), value) for i in range(23)}, tmp_path / f"{name}.safetensors")
    assert "and 3 more that differ" in run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out
    assert "w22" in run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--all").out


def test_large_tensors_are_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {
        "odd": torch.randn(5, 7),
        "nan": torch.full((9,), torch.nan),
        "one": torch.tensor(2.0),
        "none": torch.empty(0, 3),
    }
    second = {**first, "odd": first["odd"] + torch.randn(5, 7)}
    for name, tensors in (("a", first), ("b", second)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr("surgery.commands.tensor_comparison._PIECE", 4)
    done = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    rows = {row["tensor"]: row for row in done.data["tensors"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "odd": "different", "nan": "equal", "one": "equal", "none": "equal",
    }  # fmt: skip
    x, y = first["odd"].double(), second["odd"].double()
    expected = {
        "norm_a": x.norm(),
        "norm_b": y.norm(),
        "difference": (y - x).norm(),
        "relative": (y - x).norm() / x.norm(),
    }
    assert all(rows["odd"][name] == pytest.approx(float(value), rel=1e-12) for name, value in expected.items())
