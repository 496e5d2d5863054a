"""Functions that create folders leave none behind after an error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import SurgeryError, apply_rules, export_onnx, merge_to, report, save_adapter
from surgery.rules import LoraRule, PrefixRule
from surgery.transaction.created_folder import created_folder

IDS = {"input_ids": torch.ones(1, 4, dtype=torch.long)}


def bert(rule: Any = None) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    return apply_rules(model, rule or LoraRule("query", rank=2), example_inputs=IDS)


def full_disk(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def pefts(model: Any, folder: Path) -> None:
    from surgery.peft import LoraConfig, get_peft_model

    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).save_pretrained(folder)


CASES: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "save_adapter": (save_adapter, "surgery.adapter_files.tensor_files.os.fsync"),
    "merge_to": (merge_to, "surgery.storage.merged_checkpoint.merge"),
    "merge_to, written": (merge_to, "surgery.storage.merged_checkpoint.os.replace"),
    "report": (lambda model, folder: report(model, folder / "a.html"), "pathlib.Path.write_text"),
    "peft": (pefts, "surgery.adapter_files.tensor_files.os.fsync"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_folder_is_left_after_an_error_of_the_disk(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, place = CASES[case]
    model = bert()
    monkeypatch.setattr(place, full_disk)
    with pytest.raises(Exception, match="No space"):
        function(model, tmp_path / "deep" / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_can_not_be_merged_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="PrefixRule"):
        merge_to(bert(PrefixRule("self", length=2)), tmp_path / "deep" / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["peft", "surgery"])
def test_tensors_without_values_leave_no_folder(format: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    apply_rules(model, LoraRule("0", rank=2))
    with pytest.raises(SurgeryError, match=r"has no values yet(.|\n)*it is on the meta device"):
        save_adapter(model, tmp_path / "deep" / "new", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("surgery.onnx.graph.file_writing.os.replace", full_disk)
    with pytest.raises(Exception, match="No space"):
        export_onnx(nn.Sequential(nn.Linear(4, 4)).eval(), tmp_path / "deep" / "new" / "a.onnx", torch.ones(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_folders_with_files_and_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError), created_folder(tmp_path / "there"):
        raise ValueError
    with pytest.raises(ValueError), created_folder(tmp_path / "a" / "b") as folder:
        (folder.parent / "file").touch()
        raise ValueError
    assert {file.name for file in tmp_path.rglob("*")} == {"there", "a", "file"}
