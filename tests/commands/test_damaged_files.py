"""Damaged models, rules and examples: each error names the file and says why; no error is of another class."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command_line import Files, Result, run


@pytest.fixture
def model(files: Files, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files.model, tmp_path / "model"))


def refused(*words: object) -> Result:
    """Runs a command as text and as JSON; its error is one of ours in both."""
    data = run(*words, "--json").data["error"]
    assert data["type"].endswith("Error") and data["what"], data
    done = run(*words)
    assert done.code == 1 and "--traceback" not in done.err and not done.out
    return done


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "x"},
        {"hidden_size": -4},
        {"hidden_size": 15},
        {"hidden_act": "unknown"},
        {"dtype": "float99"},
        {"model_type": ["bert"]},
        {"architectures": ["GPT2LMHeadModel"]},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_does_not_take(fields: dict, files: Files, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))
    for words in (["plan", model, files.rules], ["apply", model, files.rules, "--out", model.parent / "out"]):
        assert str(model) in refused(*words).err
    assert [file.name for file in model.parent.iterdir()] == ["model"]


def test_weights_of_other_shapes(files: Files, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    done = refused("merge", model, files.peft, "--out", model.parent / "out")
    assert "don't fit BertForSequenceClassification" in done.err and "(16,)" in done.err and "(8,)" in done.err


@pytest.mark.parametrize("kept", [0, 100, 3000, -10])
def test_weights_that_are_cut(kept: int, files: Files, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    done = refused("merge", model, files.peft, "--out", model.parent / "out")
    assert "model.safetensors" in done.err


def test_a_shard_that_is_absent(files: Files, tmp_path: Path) -> None:
    files.load().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    shard = next((tmp_path / "model").glob("*00002-of*"))
    shard.unlink()
    done = refused("merge", tmp_path / "model", files.peft, "--out", tmp_path / "out")
    assert f"the index names {shard.name}" in done.err


def test_a_model_without_safetensors_files(files: Files, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = refused("merge", model, files.peft, "--out", model.parent / "out")
    assert "no weights in safetensors files" in done.err and "pytorch_model.bin" in done.err


def test_rules_that_are_not_a_text(files: Files, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_bytes("- rule: lora # é".encode("latin-1"))
    assert "not a text in UTF-8" in refused("plan", files.model, tmp_path / "rules.yaml").err
    assert "is a folder" in refused("plan", files.model, tmp_path).err


def test_an_example_that_is_cut(files: Files, tmp_path: Path) -> None:
    example = tmp_path / "example.safetensors"
    save_file({"input_ids": torch.ones(1, 4, dtype=torch.long)}, example)
    example.write_bytes(example.read_bytes()[:-8])
    done = refused("apply", files.model, files.rules, "--out", tmp_path / "out", "--example", example)
    assert "example.safetensors is damaged" in done.err


@pytest.mark.parametrize("device", ["unknown", "cuda:99", "meta"])
def test_a_device_that_is_not_here(device: str, files: Files) -> None:
    assert f"torch can't use the device {device!r}" in refused("bench", files.model, "--device", device).err


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_a_seed_out_of_range(seed: str, files: Files, tmp_path: Path) -> None:
    done = run("apply", files.model, files.rules, "--out", tmp_path / "out", "--seed", seed)
    assert done.code == 2 and not list(tmp_path.iterdir())


def test_a_part_of_a_composite_model(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config={**tiny, "vocab_size": 50}, vision_config=tiny)).save_pretrained(tmp_path / "clip")
    (tmp_path / "rules.yaml").write_text("- rule: lora\n  targets: [q_proj]\n  rank: 2\n")
    done = run("plan", tmp_path / "clip", tmp_path / "rules.yaml", "--class", "CLIPTextModel", "--json")
    assert done.code == 0 and done.data["model"] == "CLIPTextModel"
    other = refused("plan", tmp_path / "clip", tmp_path / "rules.yaml", "--class", "BertModel")
    assert "the class takes BertConfig, and the file is CLIPConfig" in other.err


# Places for results --------------------------------------------------------------------------------------------


def test_results_under_a_file_are_refused_before_the_work(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command, words in {"merge": [files.model, files.peft], "apply": [files.model, files.rules]}.items():
        assert f"{tmp_path / 'file'} is a file" in refused(command, *words, "--out", tmp_path / "file" / "out").err
    words = ["export", files.model, files.peft, "--out", tmp_path / "file" / "m.onnx"]
    assert "is a file" in refused(*words).err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_results_in_a_folder_without_rights_are_refused_before_the_work(files: Files, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        done = refused("merge", files.model, files.peft, "--out", tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)
    assert f"you may not write into {tmp_path}" in done.err


def test_a_result_goes_where_a_link_leads(files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
        done = run("apply", files.model, files.rules, "--out", tmp_path / f"to_{name}")
        assert done.code == 0 and (tmp_path / name / "adapter_config.json").is_file(), done
        assert (tmp_path / f"to_{name}").is_symlink()
