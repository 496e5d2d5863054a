"""Merges into the files of quantised checkpoints: the bits that `merge_to` writes for the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery import MergeError, SurgeryError, apply_rules, merge_files, merge_to, save_adapter
from surgery.rules import ExpertLoraRule, LoraRule
from tests.support.packed_experts import EXPERT_MODELS

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
RULES = [ExpertLoraRule("experts", rank=2, init="random"), LoraRule("o_proj", rank=2, init="random")]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a GPU before it loads fine-grained FP8 as such."""
    quantizer: Any = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **settings: None)


def mxfp4(folder: Path) -> Any:
    quantizer: Any = pytest.importorskip("transformers.quantizers.quantizer_mxfp4")
    model, config = EXPERT_MODELS[1].build()[0], transformers.Mxfp4Config()
    model.config.quantization_config, model.is_quantized = config, True
    model.hf_quantizer = quantizer.Mxfp4HfQuantizer(config)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    return model


def fp8(folder: Path) -> Any:
    """Qwen3-MoE with Linears and experts in FP8. Blocks are those of the smallest matrices."""
    config = transformers.FineGrainedFP8Config(
        weight_block_size=(16, 32), modules_to_not_convert=["lm_head", "mlp.gate"]
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    EXPERT_MODELS[2].build()[1].save_pretrained(folder / "plain")
    model = load(folder / "plain", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    index_file = folder / "base" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for file in (folder / "base").glob("*.safetensors"):  # each expert has scales of its own, as in released models
        stored = load_file(file)
        for key in [key for key in stored if key.endswith("_proj_scale_inv")]:
            path, _, name = key.removesuffix("_scale_inv").rpartition(".")
            names = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
            del index["weight_map"][key]
            for number, scales in enumerate(stored.pop(key)):
                for part, rows in zip(names, scales.chunk(len(names)), strict=True):
                    stored[f"{path}.{number}.{part}.weight_scale_inv"] = rows.clone()
                    index["weight_map"][f"{path}.{number}.{part}.weight_scale_inv"] = file.name
        save_file(stored, file, {"format": "pt"})
    index_file.write_text(json.dumps(index))
    return load(folder / "base", dtype=torch.float32)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("build", [mxfp4, fp8])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_result_is_the_one_of_merge_to(build: Any, dtype: Any, tmp_path: Path) -> None:
    model = build(tmp_path)
    torch.manual_seed(1)
    apply_rules(model, RULES)
    save_adapter(model, tmp_path / "adapter")
    merge_to(model, tmp_path / "expected", quantised="dequantise", dtype=dtype)
    out = tmp_path / "merged"
    with pytest.raises(MergeError, match=r'the base is quantised[\s\S]*quantised="dequantise"'):
        merge_files(tmp_path / "base", tmp_path / "adapter", out)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", out, quantised="dequantise", dtype=dtype)
    assert report.sites == 4 and len(list(out.glob("*.safetensors"))) > 2
    actual, expected = tensors(out), tensors(tmp_path / "expected")
    assert actual.keys() == expected.keys()
    packed = {name for name, tensor in tensors(tmp_path / "base").items() if tensor.dtype.itemsize == 1}
    assert packed
    for name, tensor in expected.items():
        if dtype is None or "experts" in name:  # merge_to leaves other parameters in their dtype
            assert torch.equal(actual[name], tensor), name
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == actual.keys()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    new = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not any(parameter.dtype.itemsize == 1 for parameter in new.parameters())


def test_what_can_not_be_done_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    model = mxfp4(tmp_path)
    save_adapter(apply_rules(model, RULES), tmp_path / "adapter")
    base, out = tmp_path / "base", tmp_path / "merged"

    def merged(**options: Any) -> Any:
        return merge_files(base, tmp_path / "adapter", out, **{"quantised": "dequantise", **options})

    with pytest.raises(SurgeryError, match="can't restore codes"):
        merged(keep_record=True)
    with pytest.raises(SurgeryError, match="not quantised anew in files"):
        merged(quantised="requantise")
    with pytest.raises(SurgeryError, match="quantised='codes' is not known"):
        merged(quantised="codes")
    file = next(file for file in base.glob("*.safetensors") if any("scales" in key for key in load_file(file)))
    stored = load_file(file)
    lost = next(key for key in stored if key.endswith("_scales"))
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, file, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"][lost]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SurgeryError, match="scales of a quantised weight are absent"):
        merged()
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=r"can't be dequantised in its files[\s\S]*hqq[\s\S]*merge_to"):
        merged()
    assert not out.exists()
