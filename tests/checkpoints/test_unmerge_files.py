"""`unmerge_files` on folders that were changed, merged twice, or whose records are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import MergeError, SurgeryError, apply_rules, merge_files, save_adapter, unmerge_files
from surgery.rules import LoraRule
from tests.support.checkpoints import contents, meta, stack, write_sharded

transformers: Any = pytest.importorskip("transformers")

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters, and the base merged with the first."""
    folder = tmp_path_factory.mktemp("made")
    for name, targets in (("first", ["0", "4"]), ("second", ["0", "1"])):
        model = stack()
        if name == "first":
            write_sharded(model, folder / "base")
        apply_rules(model, LoraRule(targets, rank=2, init="random"))
        save_adapter(model, folder / name)
    merge_files(folder / "base", folder / "first", folder / "merged", keep_record=True, model=meta())
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose head is tied, and a merge that gave it a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    settings = dict(vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, tie_word_embeddings=True))
    model.save_pretrained(folder / "base")
    config = folder / "base" / "config.json"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))
    apply_rules(model, LoraRule("lm_head", rank=2, init="random"))
    save_adapter(model, folder / "adapter")
    merge_files(folder / "base", folder / "adapter", folder / "merged", keep_record=True, untie=True, same_base=False)
    return folder


def test_a_merge_of_a_merge_comes_apart_in_two_steps(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_record": True, "model": meta(), "same_base": False}
    with pytest.warns(UserWarning, match="another base"):
        report = merge_files(made / "merged", made / "second", tmp_path / "both", **options)
    assert not report.left_out
    unmerge_files(tmp_path / "both", tmp_path / "once", model=meta())
    assert contents(tmp_path / "once") == contents(made / "merged")
    unmerge_files(tmp_path / "once", tmp_path / "twice", model=meta())
    assert contents(tmp_path / "twice") == contents(made / "base")
    # The first adapter alone does not come out of both.
    shutil.rmtree(tmp_path / "both" / "merge_record")
    shutil.copytree(made / "merged" / "merge_record", tmp_path / "both" / "merge_record")
    with pytest.raises(MergeError, match="changed while it was merged(.|\n)*take the base from its source"):
        unmerge_files(tmp_path / "both", tmp_path / "no", model=meta())


def test_texts_come_back_with_their_ends_of_lines(untied: Path, tmp_path: Path) -> None:
    unmerge_files(untied / "merged", tmp_path / "restored")
    assert contents(tmp_path / "restored") == contents(untied / "base")


def change(name: str, how: Callable[[Any], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        place = folder / name
        place.write_text(json.dumps(how(json.loads(place.read_text()))))

    return run


def entry(*path: Any, value: Any) -> Callable[[Path], None]:
    """Replaces one value in the list of records."""

    def set_value(data: Any) -> Any:
        inner = data
        for key in path[:-1]:
            inner = inner[list(inner)[0] if key is None else key]
        inner[path[-1]] = value
        return data

    return change("merge_record/record.json", set_value)


def without_a_shard(data: Any) -> Any:
    data["shards"].popitem()
    return data


def save_one(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **texts: str) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file(how(load_file(file)), file, {"format": "pt", **texts})


FOLD = ("shards", None, "folds", 0)
CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is not described": (change("merge_record/record.json", without_a_shard), "does not fit the files"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "has no weights"),
    "no records": (lambda folder: [file.unlink() for file in folder.glob("merge_record/*.record")], "is damaged"),
    "another header": (lambda folder: save_one(folder, dict, note="x"), "do not come back"),
    "another dtype": (lambda folder: save_one(folder, lambda t: {k: v.half() for k, v in t.items()}), "was changed"),
    "no width": (entry(*FOLD, "parts", "A", 3, value=[]), "is damaged"),
    "a part of a part": (entry(*FOLD, "parts", "A", value=[0, 4, "float32"]), "is damaged"),
    "a length beyond all": (entry(*FOLD, "parts", "A", 1, value=10**30), "is damaged"),
    "a long part": (entry(*FOLD, "parts", "A", 1, value=10**12), "is damaged"),
    "a text that is a number": (entry("files", value={"config.json": 5}), "is damaged"),
    "a text above": (entry("files", value={"..": "x"}), "outside of the folder|damaged"),
    "twins": (entry("twins", value={"0.weight": 3}), "damaged"),
    "twins of twins": (entry("twins", value={"0.weight": [["x"]]}), "damaged"),
    "other twins": (entry("twins", value={"0.weight": ["x"]}), "does not fit the files"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_folder_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    damage, text = CHANGES[name]
    shutil.copytree(made / "merged", tmp_path / "merged")
    damage(tmp_path / "merged")
    with pytest.raises(SurgeryError, match=text):
        unmerge_files(tmp_path / "merged", tmp_path / "restored", model=meta())
    assert [place.name for place in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("offsets", ([0, 10**15], [8, 392], [0, 12], [-5, 379], "x", [0]))
def test_a_header_that_does_not_fit_is_refused(offsets: Any, untied: Path, tmp_path: Path) -> None:
    """A file of such a size would be written before its checksum shows the damage."""
    shutil.copytree(untied / "merged", tmp_path / "merged")
    place = tmp_path / "merged" / "merge_record" / "record.json"
    data = json.loads(place.read_text())
    shard = data["shards"]["model.safetensors"]
    header = json.loads(bytes.fromhex(shard["head"])[8:])
    header["model.embed_tokens.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    shard["head"] = (len(text).to_bytes(8, "little") + text).hex()
    place.write_text(json.dumps(data))
    with pytest.raises(SurgeryError, match="damaged"):
        unmerge_files(tmp_path / "merged", tmp_path / "restored")
    assert [place.name for place in tmp_path.iterdir()] == ["merged"]


def test_an_index_of_many_megabytes(made: Path, tmp_path: Path) -> None:
    """That of a model with 90,000 tensors has 9 MB."""
    shutil.copytree(made / "base", tmp_path / "base")
    with open(tmp_path / "base" / INDEX, "a") as file:
        file.write(" " * (9 << 20))
    merge_files(tmp_path / "base", made / "first", tmp_path / "merged", keep_record=True, model=meta())
    unmerge_files(tmp_path / "merged", tmp_path / "restored", model=meta())
    assert contents(tmp_path / "restored") == contents(tmp_path / "base")
