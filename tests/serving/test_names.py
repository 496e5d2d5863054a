"""Names of modules that programs see: where they differ from the model's, and where they have none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from surgery import apply_rules, check_target, load_adapter, remove, save_adapter
from surgery.rules import LoraRule
from surgery.serving.checkpoint_names import CheckpointNames

# class, configuration, a module here, and the name in MLX-LM 0.32.2
MLX: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "GPT2LMHeadModel",
        {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 8},
        "transformer.h.0.attn.c_attn",
        "model.h.0.attn.c_attn",
    ),
    (
        "GPTNeoXForCausalLM",
        {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8},
        "gpt_neox.layers.0.attention.query_key_value",
        "model.h.0.attention.query_key_value",
    ),
    (
        "LlavaForConditionalGeneration",
        {
            "text_config": hf.LlamaConfig(
                num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=8
            ),
            "vision_config": hf.CLIPVisionConfig(
                num_hidden_layers=1,
                hidden_size=16,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=8,
                patch_size=4,
            ),
        },
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
    ),
]


def model_of(name: str, config: dict[str, Any]) -> torch.nn.Module:
    cls = getattr(hf, name)
    return cls(cls.config_class(**config))


@pytest.mark.parametrize("name, config, ours, theirs", MLX)
def test_mlx_has_its_own_names(name: str, config: dict[str, Any], ours: str, theirs: str, tmp_path: Path) -> None:
    model = apply_rules(model_of(name, config), LoraRule(ours, rank=2, init="random"))
    save_adapter(model, tmp_path, target="mlx")
    with safe_open(tmp_path / "adapters.safetensors", "pt") as file:
        assert {key.rpartition(".")[0] for key in file.keys()} == {theirs}
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["keys"] == [theirs]
    B = model.get_parameter(f"{ours}.adapters.default.B").clone()
    report = load_adapter(remove(model), tmp_path)
    assert report.format == "mlx" and torch.equal(model.get_parameter(f"{ours}.adapters.default.B"), B)


def test_vllm_passes_over_towers() -> None:
    name, config, _, _ = MLX[2]
    model = apply_rules(model_of(name, config), LoraRule(r"re:model\.vision_tower\..*q_proj", rank=2))
    assert "passes over LoRA on towers" in str(check_target(model, "vllm"))
    model = apply_rules(model_of(name, config), LoraRule(r"re:model\.language_model\..*q_proj", rank=2))
    assert check_target(model, "vllm")
    assert check_target(model, "sglang")


def test_the_names_of_a_model_without_its_head_are_refused() -> None:
    """vLLM would look for model.layers, and find layers: it would answer as the base does."""
    name, config, _, _ = MLX[2]
    model = apply_rules(hf.LlamaModel(config["text_config"]), LoraRule("q_proj", rank=2))
    assert check_target(model, "vllm")  # an embedding model, which vLLM names so
    gpt = apply_rules(model_of(*MLX[0][:2]), LoraRule("c_attn", rank=2))
    assert "runs GPT2LMHeadModel without adapters" in str(check_target(gpt, "vllm"))


def test_modules_with_another_name_in_checkpoints() -> None:
    """transformers 5 moved Mixtral's mlp; vLLM would not find the new name, and answer as the base does."""
    sizes: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))
    names = CheckpointNames(model)
    assert names.other_name("model.layers.0.mlp.gate") == "block_sparse_moe.gate"
    assert names.other_name("model.layers.0.self_attn.q_proj") is None
    assert check_target(apply_rules(model, LoraRule("q_proj", rank=2)), "vllm")
    llava = model_of(*MLX[2][:2])
    assert CheckpointNames(llava).other_name("model.language_model.layers.0.self_attn.q_proj") is None
    assert CheckpointNames(torch.nn.Linear(2, 2)).other_name("layers.0.a") is None
