"""Adapters of a pipeline's components: one file for all of them, under the names that programs know."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from surgery import SurgeryError, apply_rules, convert_adapter, load_adapter, remove, save_adapter
from surgery.rules import LoraRule
from tests.support.foreign_formats import model_of_paths, random

PATHS = ("down_blocks.0.attentions.0.to_q", "mid_block.proj_in")


class UNet2DConditionModel(nn.Module):
    """The name of diffusers' model, without its forward."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in model_of_paths({path: nn.Linear(8, 8) for path in PATHS}).named_children():
            self.add_module(name, child)


def text_encoder(projection: bool = False) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPTextConfig(**sizes, max_position_embeddings=8, projection_dim=4)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def pipeline(two: bool = False) -> nn.ModuleDict:
    parts = {"unet": UNet2DConditionModel(), "text_encoder": text_encoder()}
    return nn.ModuleDict({**parts, "text_encoder_2": text_encoder(True)} if two else parts)


def outputs(parts: nn.ModuleDict) -> list[Tensor]:
    ids, x = torch.tensor([[1, 5, 3]]), random(2, 8)
    encoded = [parts[name](ids)[0] for name in parts if name != "unet"]
    return [*encoded, *(parts["unet"].get_submodule(path)(x) for path in PATHS)]


def keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


RULES = [
    LoraRule(["to_q", "proj_in"], rank=2, alpha=3, init="random"),
    LoraRule(["q_proj", "fc1"], rank=4, alpha=2, rank_pattern={"fc1": 3}, init="random"),
]


@pytest.mark.parametrize("fmt", ["diffusers", "kohya", "lycoris"])
@pytest.mark.parametrize("two", [False, True])
def test_one_file_holds_all_components(tmp_path: Path, fmt: str, two: bool) -> None:
    parts = pipeline(two)
    base, before = copy.deepcopy(parts), outputs(parts)
    save_adapter(apply_rules(parts, RULES), tmp_path, format=fmt)
    expected = outputs(parts)
    assert not any(torch.allclose(one, other) for one, other in zip(before, expected, strict=True))
    load_adapter(base, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(outputs(base), expected, strict=True))
    single = copy.deepcopy(remove(base))["unet"]  # and each component takes its own part
    report = load_adapter(single, tmp_path)
    assert any("unet was loaded" in text for text in report.assumed)
    assert torch.equal(single.get_submodule(PATHS[0])(random(2, 8)), outputs(parts)[-2])


@pytest.mark.parametrize(
    ("fmt", "two", "start"),
    [
        ("kohya", False, "lora_te_text_model_encoder_layers_0_self_attn_q_proj."),
        ("kohya", True, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj."),
        ("kohya", True, "lora_te2_text_model_encoder_layers_0_self_attn_q_proj."),
        ("diffusers", False, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj."),
        ("comfyui", False, "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj."),
    ],
)
def test_clip_has_the_names_that_programs_know(tmp_path: Path, fmt: str, two: bool, start: str) -> None:
    """transformers 5.6 left "text_model" out of the paths of CLIPTextModel; keys without it are ignored elsewhere."""
    parts = apply_rules(pipeline(two), RULES[1])
    if fmt == "comfyui":  # which has no UNet of diffusers
        encoder = apply_rules(text_encoder(), RULES[1])
        save_adapter(encoder, tmp_path / "a.safetensors", format=fmt)
    else:
        save_adapter(parts, tmp_path / "a.safetensors", format=fmt)
    assert any(key.startswith(start) for key in keys(tmp_path / "a.safetensors"))
    live = encoder if fmt == "comfyui" else parts["text_encoder"]
    again = remove(copy.deepcopy(parts))["text_encoder"] if fmt != "comfyui" else remove(copy.deepcopy(encoder))
    load_adapter(again, tmp_path / "a.safetensors", component="text_encoder")
    ids = torch.tensor([[1, 5, 3]])
    assert torch.equal(again(ids)[0], live(ids)[0])


def test_a_class_that_stands_in_several_places_is_asked_for(tmp_path: Path) -> None:
    """CLIPTextModelWithProjection is SDXL's second text encoder, and both of Stable Diffusion 3."""
    encoder = apply_rules(text_encoder(True), RULES[1])
    with pytest.raises(SurgeryError, match="component= says which"):
        save_adapter(encoder, tmp_path / "a.safetensors", format="kohya")
    save_adapter(encoder, tmp_path / "a.safetensors", format="kohya", component="text_encoder_2")
    assert all(key.startswith("lora_te2_text_model_") for key in keys(tmp_path / "a.safetensors"))


def test_a_module_outside_of_the_components_is_named(tmp_path: Path) -> None:
    parts = pipeline()
    parts["other"] = nn.Linear(4, 4)
    apply_rules(parts, LoraRule(["to_q", "other"], rank=2))
    with pytest.raises(SurgeryError, match="in none of the components"):
        save_adapter(parts, tmp_path / "a", format="kohya")
    assert not (tmp_path / "a").exists()


def test_components_of_the_file_that_the_model_lacks_are_told(tmp_path: Path) -> None:
    save_adapter(apply_rules(pipeline(True), RULES), tmp_path, format="kohya")
    report = load_adapter(pipeline(), tmp_path)
    assert any("unet, text_encoder were loaded, and not text_encoder_2" in text for text in report.assumed)


def test_conversion_keeps_all_components(tmp_path: Path) -> None:
    parts = pipeline(True)
    base = copy.deepcopy(parts)
    save_adapter(apply_rules(parts, RULES), tmp_path / "a", format="kohya")
    convert_adapter(tmp_path / "a", tmp_path / "b", format="diffusers")
    load_adapter(base, tmp_path / "b")
    assert all(torch.equal(one, other) for one, other in zip(outputs(base), outputs(parts), strict=True))
