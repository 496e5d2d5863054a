"""`merge_files` and `unmerge_files` write only into folders where a result can lie, and say why elsewhere."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import SurgeryError, apply_rules, load_adapter, merge_files, save_adapter, unmerge_files
from surgery.checkpoints.ledger import open_ledger
from surgery.checkpoints.shard_writing import ShardWriter
from surgery.rules import LoraRule
from tests.support.checkpoints import contents, meta, stack, tensors_of, write_sharded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, and the base merged with the adapter."""
    folder = tmp_path_factory.mktemp("made")
    model = stack()
    write_sharded(model, folder / "base")
    apply_rules(model, LoraRule("all-linear", rank=2, init="random"))
    save_adapter(model, folder / "adapter")
    merge_files(folder / "base", folder / "adapter", folder / "merged", keep_record=True, model=meta())
    return folder


def refused(made: Path, out: Any, text: str, **options: Any) -> None:
    """Both functions refuse a folder, and change nothing."""
    before = contents(made)
    with pytest.raises(SurgeryError, match=text):
        merge_files(made / "base", made / "adapter", out, **{"model": meta(), **options})
    with pytest.raises(SurgeryError, match=text):
        unmerge_files(made / "merged", out, model=meta())
    assert contents(made) == before


def test_a_folder_inside_the_files_that_are_read(made: Path, tmp_path: Path) -> None:
    """The other files of the base are copied, and the result would be one of them."""
    (tmp_path / "link").symlink_to(made / "base")
    for out in (made / "base" / "out", made / "base" / "sub" / "out", tmp_path / "link" / "sub" / "out"):
        with pytest.raises(SurgeryError, match="can't be written into the base's folder"):
            merge_files(made / "base", made / "adapter", out, model=meta())
    with pytest.raises(SurgeryError, match="can't be written into the merged folder"):
        unmerge_files(made / "merged", made / "merged" / "sub" / "out", model=meta())
    assert not (made / "base" / "sub").exists() and not (made / "merged" / "sub").exists()


def test_places_where_no_folder_can_be_made(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(made, tmp_path / "loop", "can't be written(.|\n)*fix")
    refused(made, tmp_path / ("x" * 300), "can't be written(.|\n)*too long")
    refused(made, f"{tmp_path}/a\0b", "can't be written(.|\n)*null byte")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refused(made, ".", "it is the working folder")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    (tmp_path / "mount").mkdir()
    refused(made, tmp_path / "mount", "a disk is mounted(.|\n)*new folder inside it")
    with pytest.raises(SurgeryError, match="could not be written(.|\n)*too long"):  # of the unfinished folder's name
        merge_files(made / "base", made / "adapter", tmp_path / ("x" * 250), model=meta())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "loop", "mount"]


def test_arguments_that_are_not_adapters_weights_or_models(made: Path, tmp_path: Path) -> None:
    adapted = meta()
    load_adapter(adapted, made / "adapter", same_base=False)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapter": None}, "None' is not an adapter"),
        ({"adapter": [made / "adapter", 5]}, "'5' is not an adapter"),
        ({"weights": 1.0}, "weights=1.0 is not a list"),
        ({"weights": ["a"]}, "not a finite number"),
        ({"model": stack()}, "not on the meta device(.|\n)*0.weight"),
        ({"model": adapted}, "has adapters already"),
        ({"model": torch.nn.Linear}, "is not a model"),
    ]
    for options, text in wrong:
        arguments = {"adapter": made / "adapter", "model": meta(), **options}
        with pytest.raises(SurgeryError, match=text):
            merge_files(made / "base", out_folder=tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_other_files_that_can_not_be_copied_are_left_out(made: Path, tmp_path: Path) -> None:
    """Links to a folder above them, links to nothing, and special files."""
    base = tmp_path / "base"
    write_sharded(stack(), base)
    (base / "code" / "parts").mkdir(parents=True)
    (base / "code" / "parts" / "own.py").write_text("x = 1")
    (base / "code" / "parts" / "above").symlink_to(base)
    (base / "code" / "same").symlink_to(base / "code")
    (base / "nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(base / "code" / "pipe")
    report = merge_files(base, made / "adapter", tmp_path / "out", model=meta())
    assert report.left_out == ("code/parts/above/", "code/pipe", "code/same/", "nothing")
    assert (tmp_path / "out" / "code" / "parts" / "own.py").read_text() == "x = 1"


@pytest.mark.parametrize("metadata", (None, [1]))
def test_an_index_with_other_metadata(metadata: Any, made: Path, tmp_path: Path) -> None:
    base, index = tmp_path / "base", "model.safetensors.index.json"
    write_sharded(stack(), base)
    data = json.loads((base / index).read_text())
    (base / index).write_text(json.dumps({**data, "metadata": metadata}))
    merge_files(base, made / "adapter", tmp_path / "out", model=meta(), dtype=torch.bfloat16)
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert json.loads((tmp_path / "out" / index).read_text())["metadata"] == {"total_size": total}


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Lets writes of tensors fail after some. Returns a function that ends it."""
    write, count = ShardWriter.write, [0]

    def fails(self: ShardWriter, key: str, tensor: torch.Tensor) -> None:
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, key, tensor)

    monkeypatch.setattr(ShardWriter, "write", fails)
    return lambda: monkeypatch.setattr(ShardWriter, "write", write)


@pytest.mark.parametrize("workers", (1, 2))
def test_a_full_disk_is_an_error_and_the_next_run_goes_on(
    workers: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = full_disk(monkeypatch, after=3)
    with pytest.raises(SurgeryError, match="No space left(.|\n)*with the same arguments"):
        merge_files(made / "base", made / "adapter", tmp_path / "out", model=meta(), workers=workers)
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.unfinished"]
    end()
    report = merge_files(made / "base", made / "adapter", tmp_path / "out", model=meta())
    assert report.reused
    merged = contents(made / "merged", ["merge_record/"])
    assert contents(tmp_path / "out") == merged
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_run_with_another_configuration_begins_anew(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    write_sharded(stack(), base)
    end = full_disk(monkeypatch, after=3)
    with pytest.raises(SurgeryError, match="No space left"):
        merge_files(base, made / "adapter", tmp_path / "out", model=meta())
    end()
    (base / "config.json").write_text("{}")
    assert not merge_files(base, made / "adapter", tmp_path / "out", model=meta()).reused


def test_a_result_that_another_run_finished_meanwhile(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_ledger(out), pytest.raises(SurgeryError, match="another process writes this result"), open_ledger(out):
        pass
    out.mkdir()
    (out / "x").write_text("x")
    with pytest.raises(SurgeryError, match="exists already"), open_ledger(out):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
