"""`surgery inspect`: formats, sites, ranks and bases, from headers and settings alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import apply_rules, save_adapter
from surgery.rules import HraRule, LohaRule, LoraRule, TrainRule, VeraRule
from tests.support.command_line import Files, run

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_adapters_in_both_formats_have_the_same_sites(files: Files) -> None:
    peft, ours = run("inspect", files.peft, "--json").data, run("inspect", files.ours, "--json").data
    assert (peft["format"], ours["format"]) == ("PEFT", "surgery")
    assert [site["path"] for site in peft["sites"]] == [site["path"] for site in ours["sites"]]
    assert peft["sites"][0] == {"path": QUERY, "rank": 4, "tensors": {"lora_A": [4, 16], "lora_B": [16, 4]}}
    assert ours["sites"][0] == {"path": QUERY, "rank": 2, "tensors": {"A": [2, 16], "B": [16, 2]}}
    for described in (peft, ours):
        assert described["base"]["class"] == "BertForSequenceClassification"
        assert described["licence"] == "apache-2.0" and described["metadata"] == {"accuracy": 0.9}
        stored = load_file(next(Path(described["path"]).glob("*.safetensors")))
        assert described["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert "peft" in peft["opens_with"] and "peft" not in ours["opens_with"]


@pytest.mark.parametrize("kind", [LoraRule, LohaRule, VeraRule, HraRule], ids=lambda kind: kind.__name__)
def test_ranks_of_other_methods(kind: type[Any], tmp_path: Path) -> None:
    model = apply_rules(nn.ModuleDict({"a": nn.Linear(12, 12)}), kind("a", rank=3))
    for format in ("surgery", "peft"):
        save_adapter(model, tmp_path / format, format=format)
        sites = {site["path"]: site for site in run("inspect", tmp_path / format, "--json").data["sites"]}
        assert sites["a"]["rank"] == 3 and sites.keys() <= {"a", ""}


def test_a_file_of_an_adapter_is_the_adapter(files: Files) -> None:
    described = run("inspect", files.peft / "adapter_model.safetensors", "--json").data
    assert described["sites"] == run("inspect", files.peft, "--json").data["sites"]


def test_keys_of_other_programs_have_sites(tmp_path: Path) -> None:
    tensors = {f"unet.mid.attn.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    described = run("inspect", tmp_path, "--json").data
    assert described["format"] == "diffusers" and [site["rank"] for site in described["sites"]] == [2]


def test_a_whole_module_is_a_site(tmp_path: Path) -> None:
    model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [LoraRule("0", rank=2), TrainRule("1")])
    save_adapter(model, tmp_path, format="peft")
    sites = {site["path"]: site for site in run("inspect", tmp_path, "--json").data["sites"]}
    assert sites["1"]["tensors"] == {"weight": [2, 4], "bias": [2]} and sites["1"]["rank"] is None


def test_a_model_and_its_shards(files: Files, tmp_path: Path) -> None:
    described = run("inspect", files.model, "--json").data
    assert described["class"] == "BertForSequenceClassification" and described["shards"] == 1
    model = files.load()
    assert described["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    sharded = run("inspect", tmp_path, "--json").data
    assert sharded["shards"] > 1 and sharded["parameters"] == described["parameters"]
    next(tmp_path.glob("*00002-of*")).unlink()
    assert run("inspect", tmp_path, "--json").data["missing"]


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    done = run("inspect", tmp_path)
    assert done.code == 1 and "outside of its folder" in done.err


def test_a_folder_of_adapters(files: Files) -> None:
    done = run("inspect", files.peft.parent)
    assert done.code == 0 and "mail: surgery, 2 sites" in done.out and "news: PEFT, 2 sites" in done.out


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    described = run("inspect", tmp_path, "--json").data
    assert described["rules"] == [{"rule": "PEFT's LORA", "r": 4}] and "not opened" in described["notes"][0]
    (tmp_path / "other.pt").write_bytes(pickle.dumps(Bomb()))
    assert "not opened" in run("inspect", tmp_path / "other.pt").out


def test_any_safetensors_file(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2).half()}, tmp_path / "x.safetensors")
    described = run("inspect", tmp_path / "x.safetensors", "--json").data
    assert described["dtypes"] == {"F32": 6, "F16": 2} and len(described["sites"]) == 1


def test_names_do_not_command_the_terminal(tmp_path: Path) -> None:
    name = "a\x1b]0;title\x07b"
    save_file({f"{name}.weight": torch.ones(1)}, tmp_path / "x.safetensors", {"note": name})
    done = run("inspect", tmp_path / "x.safetensors")
    assert done.code == 0 and "\x1b" not in done.out and "\\x1b]0;title\\x07b" in done.out
    assert run("inspect", tmp_path / "x.safetensors", "--json").data["sites"][0]["path"] == name
    error = run("inspect", tmp_path / name)
    assert error.code == 1 and "\x1b" not in error.err


def test_long_lists_are_cut_and_all_shows_them(tmp_path: Path) -> None:
    save_file({f"layers.{i}.weight": torch.ones(1) for i in range(25)}, tmp_path / "x.safetensors")
    assert "and 5 more sites" in run("inspect", tmp_path / "x.safetensors").out
    assert "layers.24" in run("inspect", tmp_path / "x.safetensors", "--all").out


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x08\x00\x00\x00\x00\x00\x00\x00not json"])
def test_damaged_files_are_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    done = run("inspect", tmp_path / "x.safetensors")
    assert done.code == 1 and done.err.startswith("error: ")


def test_wrong_paths_get_near_misses(files: Files, tmp_path: Path) -> None:
    assert "did you mean 'bert'?" in run("inspect", files.folder / "brt").err
    done = run("inspect", tmp_path, "--json")
    assert done.code == 1 and done.data["error"]["why"] == "it is empty"
    (tmp_path / "x.txt").write_text("")
    assert "a format that is not known here" in run("inspect", tmp_path / "x.txt").err


def test_formats_of_other_programs(files: Files, tmp_path: Path) -> None:
    done = run("convert", files.peft, "--to", "mlx", "--out", tmp_path / "mlx")
    assert done.code == 0, done
    shown = run("inspect", tmp_path / "mlx")
    assert "MLX-LM" in shown.out and "A[4, 16] B[16, 4]" in shown.out and "fine_tune_type" in shown.out
    data = run("inspect", tmp_path / "mlx/adapters.safetensors", "--json").data
    assert data["ranks"] == {"4": 2} and data["opens_with"] == ["surgery.load_adapter(…, format='mlx')"]
    refused = run("convert", files.ours, "--to", "mlx", "--out", tmp_path / "other")
    assert refused.code == 1 and "in Python" in refused.err and not (tmp_path / "other").exists()
    again = run("convert", files.peft, "--to", "kohya", "--out", tmp_path / "a.safetensors")
    assert again.code == 1 and "--component says which" in again.err and not list(tmp_path.glob("a.*"))


def test_programs_that_take_an_adapter(files: Files, tmp_path: Path) -> None:
    rows = run("check", files.peft, "--json").data["targets"]
    assert {row["target"]: row["taken"] for row in rows}["openvino"]
    refused = run("check", files.peft, "--target", "vllm", "--base", files.model)
    assert refused.code == 1 and "runs BertForSequenceClassification without adapters" in refused.out
    done = run("convert", files.peft, "--target", "openvino", "--out", tmp_path / "served")
    assert done.code == 0 and [file.name for file in (tmp_path / "served").iterdir()] == ["openvino_lora.safetensors"]
    again = run("convert", files.peft, "--target", "vllm", "--base", files.model, "--out", tmp_path / "other")
    assert again.code == 1 and "these take it: " in again.err and not (tmp_path / "other").exists()
    assert "--target the program" in run("convert", files.peft, "--out", tmp_path / "other").err


def test_rules_become_lora_on_the_base(files: Files, tmp_path: Path) -> None:
    """The model is loaded where the files alone do not tell the change of the weights."""
    assert "--base" in run("check", files.ours, "--target", "openvino").out
    done = run("convert", files.ours, "--target", "openvino", "--base", files.model, "--out", tmp_path / "new")
    assert done.code == 0, done
