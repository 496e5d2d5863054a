"""Files rewritten in other formats without a model: out and back to the same bits, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery import (
    AdapterFormat,
    LoadError,
    SurgeryError,
    TensorKey,
    adapter_formats,
    convert_adapter,
    load_adapter,
    register_format,
)
from surgery.storage.formats import table
from tests.support.foreign_formats import low_rank, model_of_paths, random, same, write

TEXT = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
FILES: dict[str, dict[str, Tensor]] = {
    "sd15": low_rank("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj", 6, 4, 2, 1.0)
    | low_rank("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 6, 4, 4, 1.0),
    "sdxl": low_rank("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_out_0", 4, 4, 2, 1.0)
    | low_rank(TEXT, 6, 4, 3, 3.0)
    | low_rank(TEXT.replace("te1", "te2"), 6, 4, 3, 2.0),
    "flux": low_rank("lora_unet_double_blocks_11_txt_attn_qkv", 12, 4, 3, 2.0)
    | low_rank("lora_unet_single_blocks_0_linear1", 28, 4, 5, 2.0),
    "sd3": low_rank("lora_unet_joint_blocks_0_context_block_attn_qkv", 12, 4, 4, 2.0)
    | low_rank("lora_unet_joint_blocks_0_x_block_mlp_fc1", 12, 4, 4, 2.0),
}


@pytest.mark.parametrize("name", FILES)
def test_kohya_to_diffusers_and_back(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.safetensors", FILES[name])
    there = convert_adapter(source, tmp_path / "diffusers", format="diffusers")
    assert there.source_format == "kohya" and there.modules
    file = tmp_path / "diffusers/pytorch_lora_weights.safetensors"
    assert all(".lora_A." in key or ".lora_B." in key for key in load_file(file))
    base = {"_class_name": "SD3Transformer2DModel"} if name == "sd3" else None
    base = {"_class_name": "FluxTransformer2DModel"} if name == "flux" else base
    back = convert_adapter(tmp_path / "diffusers", tmp_path / "back.safetensors", format="kohya", base=base)
    assert back.source_format == "diffusers" and back.modules == there.modules
    written = {
        key.replace("lora_te_", "lora_te1_"): value for key, value in load_file(tmp_path / "back.safetensors").items()
    }
    assert same(written, FILES[name])


def test_peft_to_mlx_and_back(tmp_path: Path) -> None:
    path = "model.layers.{}.self_attn.q_proj"
    tensors = {f"base_model.model.{path.format(n)}.lora_A.weight": random(4, 8) for n in (0, 1)}
    tensors |= {f"base_model.model.{path.format(n)}.lora_B.weight": random(6, 4) for n in (0, 1)}
    tensors |= {"base_model.model.model.embed_tokens.lora_embedding_A": random(4, 32)}
    tensors |= {"base_model.model.model.embed_tokens.lora_embedding_B": random(8, 4)}
    write(tmp_path / "peft/adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    report = convert_adapter(tmp_path / "peft", tmp_path / "mlx", format="mlx")
    assert report.source_format == "peft" and str(report).endswith("3 modules, peft to mlx")
    settings = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert settings["lora_parameters"]["scale"] == 8.0  # 16 / sqrt(4)
    there = load_file(tmp_path / "mlx/adapters.safetensors")
    assert there["model.embed_tokens.lora_a"].shape == (32, 4)
    back = convert_adapter(tmp_path / "mlx", tmp_path / "back", format="peft")
    assert back.assumed == ["model.embed_tokens is taken to be a table of embeddings, by its name"]
    assert same(load_file(tmp_path / "back/adapter_model.safetensors"), tensors)
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["lora_alpha"] == 32  # 32 / 4, without rslora


def test_half_precision_stays(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {key: value.to(dtype) for key, value in FILES["sd15"].items()}
        convert_adapter(write(tmp_path / "a.safetensors", tensors), tmp_path / "b", format="diffusers")
        convert_adapter(tmp_path / "b", tmp_path / "c.safetensors", format="kohya")
        back = load_file(tmp_path / "c.safetensors")
        assert same(back, tensors) and {tensor.dtype for tensor in back.values()} == {dtype}


def test_names_that_are_not_known_need_the_base(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", low_rank("lora_unet_odd_place_my_layer", 4, 4, 2, 1.0))
    with pytest.raises(LoadError, match="base= gives the model"):
        convert_adapter(source, tmp_path / "b", format="diffusers")
    assert not (tmp_path / "b").exists()
    base = model_of_paths({"odd_place.my_layer": nn.Linear(4, 4)})
    report = convert_adapter(source, tmp_path / "b", format="diffusers", base=base)
    assert report.modules == ["unet.odd_place.my_layer"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    write(tmp_path / "model/part.safetensors", {"odd_place.my_layer.weight": random(4, 4)})
    again = convert_adapter(source, tmp_path / "c", format="diffusers", base=tmp_path / "model")
    assert again.modules == report.modules


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"modules_to_save": ["head"]}, {"peft_type": "IA3"}])
def test_what_can_not_be_converted_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    tensors = {"base_model.model.a.lora_A.weight": random(2, 4), "base_model.model.a.lora_B.weight": random(4, 2)}
    tensors |= {"base_model.model.a.lora_B.bias": random(4)} if "lora_bias" in fields else {}
    write(tmp_path / "a/adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"], **fields}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError):
        convert_adapter(tmp_path / "a", tmp_path / "b", format="mlx")
    assert not (tmp_path / "b").exists()


def test_the_base_of_a_component_changes_no_names(tmp_path: Path) -> None:
    """Keys of a pipeline's file begin with the component, whose modules a base lists without it."""
    tensors = {"text_encoder.a.lora_A.weight": random(2, 4), "text_encoder.a.lora_B.weight": random(4, 2)}
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 4})}
    source = write(tmp_path / "pytorch_lora_weights.safetensors", tensors, header)
    base = model_of_paths({"a": nn.Linear(4, 4)})
    report = convert_adapter(source, tmp_path / "b", format="kohya", base=base)
    assert (report.source_format, report.modules) == ("diffusers", ["text_encoder.a"])


def test_a_folder_with_a_file_of_openvino(tmp_path: Path) -> None:
    """Its keys are PEFT's, and its name tells the format."""
    tensors = {"base_model.model.a.lora_A.weight": random(2, 4), "base_model.model.a.lora_B.weight": random(4, 2)}
    write(tmp_path / "a/openvino_lora.safetensors", tensors)
    report = load_adapter(model_of_paths({"a": nn.Linear(4, 4)}), tmp_path / "a")
    assert report.format == "openvino" and "by its name, the file has the format 'openvino'" in report.assumed[0]
    assert convert_adapter(tmp_path / "a", tmp_path / "b", format="mlx").source_format == "openvino"


def test_two_alphas_for_one_layer(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": random(2, 4), "unet.a.lora_B.weight": random(4, 2)}
    tensors["unet.a.alpha"] = torch.tensor(3.0)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    source = write(tmp_path / "pytorch_lora_weights.safetensors", tensors, header)
    with pytest.raises(LoadError, match="two alphas for one layer"):
        convert_adapter(source, tmp_path / "b", format="kohya")


def test_a_format_is_added_without_code(tmp_path: Path) -> None:
    keys = (TensorKey("A", "/first", "transposed"), TensorKey("B", "/second"), TensorKey("alpha", "/strength"))
    mine = AdapterFormat("mine", "My program", keys, files=("mine.safetensors",))
    register_format(mine)
    try:
        assert "mine" in adapter_formats()
        tensors = {"a.b/first": random(4, 2), "a.b/second": random(3, 2), "a.b/strength": torch.tensor(4.0)}
        model = model_of_paths({"a.b": nn.Linear(4, 3)})
        before = model.get_submodule("a.b")(x := random(2, 4))
        report = load_adapter(model, write(tmp_path / "in.safetensors", tensors))
        assert report.format == "mine"
        expected = before + 2.0 * (x @ tensors["a.b/first"]) @ tensors["a.b/second"].T
        assert torch.allclose(model.get_submodule("a.b")(x), expected, atol=1e-5)
        convert_adapter(tmp_path / "in.safetensors", tmp_path / "peft", format="peft")
        convert_adapter(tmp_path / "peft", tmp_path / "out", format="mine")
        assert same(load_file(tmp_path / "out/mine.safetensors"), tensors)
        twin = AdapterFormat("twin", "Another with the same keys", keys, files=("twin.safetensors",), scale="none")
        register_format(twin)
        with pytest.raises(LoadError, match="may have the format 'mine' or 'twin'"):
            load_adapter(model, tmp_path / "in.safetensors", "second")
        assert load_adapter(model, tmp_path / "in.safetensors", "second", format="mine").format == "mine"
        with pytest.raises(SurgeryError, match="there is a format 'mine' already"):
            register_format(AdapterFormat("mine", "Another", (), ()))
    finally:
        for name in ("mine", "twin"):
            table._formats.pop(name, None)
