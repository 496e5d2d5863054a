"""Adapters in formats of other programs: loaded with the change that the file's tensors mean, saved, and loaded again.

The reference is W + scale · B A, computed by hand from the file's tensors.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery import (
    LoadError,
    SurgeryError,
    SurgeryWarning,
    adapter_state_dict,
    apply_rules,
    convert_adapter,
    hotswap,
    load_adapter,
    load_adapters,
    remove,
    rules_of,
    save_adapter,
)
from surgery.rules import IA3Rule, LoraRule
from surgery.testing import Snapshot
from tests.support.foreign_formats import change_of, low_rank, model_of_paths, random, same, write

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order


def delta(tensors: dict[str, Tensor], name: str, scale: float) -> Tensor:
    return scale * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]


# Kohya --------------------------------------------------------------------------------------------------------

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya() -> dict[str, Tensor]:
    tensors = low_rank(f"lora_unet_{UNET.replace('.', '_')}", 6, 8, 4, 2.0)
    tensors |= low_rank("lora_unet_mid_block_attentions_0_proj_in", 8, 8, 2, 8.0)
    return tensors | low_rank(f"lora_te_{TEXT.replace('.', '_')}", 5, 3, 4, 1.0)


def unet() -> nn.Module:
    return model_of_paths({UNET: nn.Linear(8, 6), "mid_block.attentions.0.proj_in": nn.Conv2d(8, 8, 1)})


def test_kohya_is_read_by_its_keys(tmp_path: Path) -> None:
    base, tensors = unet(), kohya()
    model = copy.deepcopy(base)
    report = load_adapter(model, write(tmp_path / "any name.safetensors", tensors))
    assert report.format == "kohya" and "'kohya'" in report.assumed[0]
    assert any("of several components, unet was loaded" in text for text in report.assumed)
    assert "matrices are loaded as kernels of size 1" in report.assumed
    x = random(2, 8)
    change = delta(tensors, f"lora_unet_{UNET.replace('.', '_')}", 0.5)
    assert torch.allclose(change_of(model, UNET, x, base), x @ change.T, **CLOSE)
    change = delta(tensors, "lora_unet_mid_block_attentions_0_proj_in", 4.0)
    image = random(1, 8, 2, 2)
    found = change_of(model, "mid_block.attentions.0.proj_in", image, base)
    assert torch.allclose(found, torch.einsum("oi,bihw->bohw", change, image), **CLOSE)


def test_a_text_encoder_takes_its_own_part(tmp_path: Path) -> None:
    base, tensors = model_of_paths({TEXT: nn.Linear(3, 5)}), kohya()
    model = copy.deepcopy(base)
    load_adapter(model, write(tmp_path / "a.safetensors", tensors))
    change = delta(tensors, f"lora_te_{TEXT.replace('.', '_')}", 0.25)
    assert torch.allclose(change_of(model, TEXT, x := random(2, 3), base), x @ change.T, **CLOSE)


def test_lora_mid_is_one_kernel_with_lora_down(tmp_path: Path) -> None:
    base = model_of_paths({"down_blocks.0.resnets.0.conv1": nn.Conv2d(3, 5, 3, padding=1)})
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, middle, up = random(2, 3, 1, 1), random(2, 2, 3, 3), random(5, 2, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": middle, f"{name}.lora_up.weight": up}
    model = copy.deepcopy(base)
    load_adapter(model, write(tmp_path / "a.safetensors", {**tensors, f"{name}.alpha": torch.tensor(1.0)}))
    x, conv = random(1, 3, 4, 4), nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(x, down), middle, padding=1), up)
    assert torch.allclose(change_of(model, "down_blocks.0.resnets.0.conv1", x, base), expected, **CLOSE)


def test_sdxl_names_blocks_as_stability_does(tmp_path: Path) -> None:
    paths = {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn.to_q": "input_blocks_4_1_transformer_blocks_1_attn_to_q",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.1.resnets.2.conv2": "output_blocks_5_0_out_layers_3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "add_embedding.linear_1": "label_emb_0_0",
    }
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(paths.values()):
        tensors |= low_rank(f"lora_unet_{name}", 4, 4, 2, 2.0, number)
    model = model_of_paths({path: nn.Linear(4, 4) for path in paths})
    base = copy.deepcopy(model)
    load_adapter(model, write(tmp_path / "a.safetensors", tensors))
    x = random(2, 4)
    for path, name in paths.items():
        expected = x @ delta(tensors, f"lora_unet_{name}", 1.0).T
        assert torch.allclose(change_of(model, path, x, base), expected, **CLOSE), path
    save_adapter(model, tmp_path / "out", format="kohya", component="unet")
    assert same(load_file(tmp_path / "out/lora.safetensors"), tensors)


# Flux: fused modules --------------------------------------------------------------------------------------------

FLUX = {
    "transformer_blocks.0.attn.to_q": (4, 4),
    "transformer_blocks.0.attn.to_k": (4, 4),
    "transformer_blocks.0.attn.to_v": (4, 4),
    "single_transformer_blocks.0.attn.to_q": (4, 4),
    "single_transformer_blocks.0.attn.to_k": (4, 4),
    "single_transformer_blocks.0.attn.to_v": (4, 4),
    "single_transformer_blocks.0.proj_mlp": (4, 16),
    "norm_out.linear": (4, 8),
}


def flux_file() -> dict[str, Tensor]:
    tensors = low_rank("lora_unet_double_blocks_0_img_attn_qkv", 12, 4, 3, 6.0)
    tensors |= low_rank("lora_unet_single_blocks_0_linear1", 28, 4, 2, 1.0)
    return tensors | low_rank("lora_unet_final_layer_adaLN_modulation_1", 8, 4, 2, 2.0)


class FluxTransformer2DModel(nn.Module):
    """The names of diffusers' model, without its forward."""

    def __init__(self) -> None:
        super().__init__()
        inner = model_of_paths({path: nn.Linear(*size) for path, size in FLUX.items()})
        for name, child in inner.named_children():
            self.add_module(name, child)


def test_fused_modules_are_split_and_joined(tmp_path: Path) -> None:
    tensors, model = flux_file(), FluxTransformer2DModel()
    base = copy.deepcopy(model)
    load_adapter(model, write(tmp_path / "a.safetensors", tensors))
    x = random(2, 4)
    for start, name, scale, paths in (
        ("transformer_blocks.0.attn.", "double_blocks_0_img_attn_qkv", 2.0, ("to_q", "to_k", "to_v")),
        ("single_transformer_blocks.0.", "single_blocks_0_linear1", 0.5,
         ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ):  # fmt: skip
        expected = x @ delta(tensors, f"lora_unet_{name}", scale).T
        found = torch.cat([change_of(model, start + path, x, base) for path in paths], -1)
        assert torch.allclose(found, expected, **CLOSE)
    shift, scale = (x @ delta(tensors, "lora_unet_final_layer_adaLN_modulation_1", 1.0).T).chunk(2, -1)
    found = change_of(model, "norm_out.linear", x, base)  # diffusers has the scale first
    assert torch.allclose(found, torch.cat([scale, shift], -1), **CLOSE)
    save_adapter(model, tmp_path / "out", format="kohya")
    assert same(load_file(tmp_path / "out/lora.safetensors"), tensors)


def test_parts_with_ranks_of_their_own_keep_them(tmp_path: Path) -> None:
    """sd-scripts' `split_qkv` joins the parts block-diagonally."""
    model = FluxTransformer2DModel()
    apply_rules(model, LoraRule(["to_q", "to_k", "to_v", "proj_mlp"], rank=2, alpha=3, init="random"))
    before = {path: model.get_submodule(path)(random(2, 4)) for path in FLUX}
    save_adapter(model, tmp_path / "out.safetensors", format="kohya")
    written = load_file(tmp_path / "out.safetensors")
    assert written["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (28, 8)
    remove(model)
    load_adapter(model, tmp_path / "out.safetensors")
    for path, expected in before.items():
        assert torch.allclose(model.get_submodule(path)(random(2, 4)), expected, **CLOSE)
    assert {rule.rank for rule in rules_of(model)} == {2}  # type: ignore[attr-defined]


def test_a_missing_part_is_written_as_zeros_and_told(tmp_path: Path) -> None:
    model = FluxTransformer2DModel()
    apply_rules(model, LoraRule("transformer_blocks.0.attn.to_q", rank=2, init="random"))
    with pytest.warns(SurgeryWarning, match="to_k, transformer_blocks.0.attn.to_v, whose change is written as zeros"):
        save_adapter(model, tmp_path / "a.safetensors", format="kohya")


def test_modules_of_two_architectures_are_asked_for(tmp_path: Path) -> None:
    model = model_of_paths({"transformer_blocks.0.attn.to_q": nn.Linear(4, 4)})
    apply_rules(model, LoraRule("to_q", rank=2))
    with pytest.raises(SurgeryError, match="may be those of flux or sd3"):
        save_adapter(model, tmp_path / "a", format="kohya", component="transformer")


# MLX ----------------------------------------------------------------------------------------------------------

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def mlx(folder: Path, dora: bool = False) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in PATHS:
        tensors |= {f"{path}.lora_a": random(8, 4), f"{path}.lora_b": random(4, 6)}
        tensors |= {f"{path}.m": random(6).abs() + 1} if dora else {}
    write(folder / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "model": "a model", "seed": 0}
    config["lora_parameters"] = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def language_model() -> nn.Module:
    return model_of_paths({path: nn.Linear(8, 6) for path in PATHS})


def test_mlx_keeps_transposes_and_a_scale(tmp_path: Path) -> None:
    tensors, model = mlx(tmp_path / "in"), language_model()
    base, x = copy.deepcopy(model), random(2, 8)
    assert load_adapter(model, tmp_path / "in").format == "mlx"
    for path in PATHS:
        expected = 20.0 * (x @ tensors[f"{path}.lora_a"]) @ tensors[f"{path}.lora_b"]
        assert torch.allclose(change_of(model, path, x, base), expected, atol=1e-3)  # the scale is 20
    save_adapter(model, tmp_path / "out", format="mlx")
    assert same(load_file(tmp_path / "out/adapters.safetensors"), tensors)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": list(PATHS)}


def test_mlx_dora(tmp_path: Path) -> None:
    tensors, model = mlx(tmp_path / "in", dora=True), language_model()
    x, path = random(2, 8), PATHS[0]
    layer = model.get_submodule(path)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[operator, union-attr]
    load_adapter(model, tmp_path / "in")
    whole = weight + 20.0 * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
    whole = whole * (tensors[f"{path}.m"] / whole.norm(dim=1))[:, None]
    assert torch.allclose(model.get_submodule(path)(x), x @ whole.T + bias, **CLOSE)
    save_adapter(model, tmp_path / "out", format="mlx")
    assert same(load_file(tmp_path / "out/adapters.safetensors"), tensors)


def test_one_scale_for_all_modules_is_folded_and_told(tmp_path: Path) -> None:
    model = language_model()
    pattern = {"down_proj": 24}
    apply_rules(model, LoraRule(list(PATHS), rank=2, alpha=4, alpha_pattern=pattern, init="random"))
    x = random(2, 8)
    expected = [model.get_submodule(path)(x) for path in PATHS]
    with pytest.warns(SurgeryWarning, match="the scale of 1 modules, such as"):
        save_adapter(model, tmp_path, format="mlx")
    load_adapter(remove(model), tmp_path)
    for path, output in zip(PATHS, expected, strict=True):
        assert torch.allclose(model.get_submodule(path)(x), output, **CLOSE)


def test_swapped_and_loaded_with_others(tmp_path: Path) -> None:
    """`hotswap` and `load_adapters` take the formats of other programs, too."""
    mlx(tmp_path / "news")
    model = language_model()
    assert list(load_adapters(model, tmp_path)) == ["news"]
    expected = model.get_submodule(PATHS[0])(x := random(2, 8))
    with torch.no_grad():
        adapter_state_dict(model, "news")[f"{PATHS[0]}.adapters.B"].zero_()
    assert not torch.allclose(model.get_submodule(PATHS[0])(x), expected)
    hotswap(model, "news", tmp_path / "news")
    assert torch.equal(model.get_submodule(PATHS[0])(x), expected)


def test_settings_that_contradict_the_tensors(tmp_path: Path) -> None:
    mlx(tmp_path)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora"', '"dora"'))
    with pytest.raises(LoadError, match="differ in the method"):
        load_adapter(language_model(), tmp_path)
    settings.unlink()
    with pytest.raises(LoadError, match="the scale is not known"):
        load_adapter(language_model(), tmp_path)


# Damage -------------------------------------------------------------------------------------------------------

NAME = f"lora_unet_{UNET.replace('.', '_')}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}.lora_up.weight"), "the tensor B is missing"),
        (lambda t: t.update({f"{NAME}.lora_up.weight": random(6, 3)}), "differ in rank"),
        (lambda t: t.update({"lora_unet_attn.weird": random(2)}), "no place in the format 'kohya'"),
        (lambda t: t.update({"model.q_proj.lora_A.weight": random(2, 2)}), "model.q_proj.lora_A.weight"),
        (lambda t: t.update(low_rank("lora_unet_of_nothing", 2, 2, 2, 1.0)), "lora_unet_of_nothing"),
        (lambda t: t.update({f"{NAME}.alpha": torch.tensor(float("nan"))}), "is not a number above 0"),
        (lambda t: t.update({f"{NAME}.alpha": torch.ones(2)}), "is not one number"),
        (lambda t: t.update({f"{NAME}.dora_scale": random(1, 8)}), "a magnitude for each input"),
        (lambda t: t.update({f"{NAME}.lora_down.weight": random(4, 9)}), "does not give"),
    ],
)
def test_a_file_that_is_not_whole_names_the_key(tmp_path: Path, change: object, words: str) -> None:
    tensors, model = kohya(), unet()
    before = Snapshot(model)
    change(tensors)  # type: ignore[operator]
    with pytest.raises(LoadError, match=words.replace(".", r"\.")):
        load_adapter(model, write(tmp_path / "a.safetensors", tensors))
    assert not before.differences(model)


def test_an_alpha_that_is_missing_is_told(tmp_path: Path) -> None:
    tensors = {key: value for key, value in kohya().items() if not key.endswith("alpha")}
    report = load_adapter(
        unet(), write(tmp_path / "a.safetensors", tensors, {"ss_network_args": '{"split_qkv": "True"}'})
    )
    assert any("split_qkv" in text for text in report.assumed) and len(report.assumed) == 5
    assert "the file does not say alpha: it is taken to be the rank, a scale of 1" in report.assumed


def test_the_header_says_alpha_where_keys_do_not(tmp_path: Path) -> None:
    tensors, model = low_rank(NAME, 6, 8, 4, None), unet()
    base = copy.deepcopy(model)
    load_adapter(model, write(tmp_path / "a.safetensors", tensors, {"ss_network_alpha": "12"}))
    x = random(2, 8)
    assert torch.allclose(change_of(model, UNET, x, base), x @ delta(tensors, NAME, 3.0).T, **CLOSE)


def test_what_a_format_can_not_hold(tmp_path: Path) -> None:
    model = apply_rules(language_model(), IA3Rule(["q_proj"]))
    with pytest.raises(SurgeryError):
        save_adapter(model, tmp_path / "a", format="mlx")
    model = apply_rules(language_model(), LoraRule(["q_proj"], rank=2, lora_bias=True))
    with pytest.raises(SurgeryError, match="no place for the tensor 'B_bias'"):
        save_adapter(model, tmp_path / "a", format="mlx")
    with pytest.raises(SurgeryError, match="there is no format 'pickle'"):
        save_adapter(model, tmp_path / "a", format="pickle")
    model = apply_rules(language_model(), LoraRule(["q_proj"], rank=2))
    with pytest.raises(SurgeryError, match="component= says which"):
        save_adapter(model, tmp_path / "a", format="kohya")
    assert not (tmp_path / "a").exists()


# llama.cpp ----------------------------------------------------------------------------------------------------

LLAMA = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")


class Llama(nn.Module):
    """The names of transformers' Llama, without its forward: two query heads of 4 and one key head."""

    def __init__(self, model_type: str = "llama") -> None:
        super().__init__()
        sizes = zip(LLAMA, (8, 4, 8), strict=True)
        layers: dict[str, nn.Module] = {path: nn.Linear(8, size, bias=False) for path, size in sizes}
        inner = model_of_paths({**layers, "model.embed_tokens": nn.Embedding(16, 8)})
        self.add_module("model", inner.get_submodule("model"))
        self.config = {"model_type": model_type, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_gguf_permutes_heads_by_architecture(tmp_path: Path, model_type: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = Llama(model_type)
    apply_rules(model, LoraRule([*LLAMA, "embed_tokens"], rank=2, alpha=8, init="random"))
    x, ids = random(2, 8), torch.arange(4)
    expected = [*(model.get_submodule(path)(x) for path in LLAMA), model.get_submodule("model.embed_tokens")(ids)]
    save_adapter(model, tmp_path, format="gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == model_type and fields["adapter.lora.alpha"] == 8.0
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert tensors["token_embd.weight.lora_a"].shape == (16, 2)  # llama.cpp looks rows of it up
    B = adapter_state_dict(model)[f"{LLAMA[0]}.adapters.B"]
    pairs = B.view(2, 2, 2, 2).transpose(1, 2).reshape(8, 2) if model_type == "llama" else B
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], pairs)
    remove(model)
    report = load_adapter(model, tmp_path)
    assert report.format == "gguf"
    again = [*(model.get_submodule(path)(x) for path in LLAMA), model.get_submodule("model.embed_tokens")(ids)]
    assert all(torch.equal(one, two) for one, two in zip(expected, again, strict=True))


def test_gguf_of_a_text_model_in_a_larger_one(tmp_path: Path) -> None:
    """llama.cpp names the text model of a larger one as if it stood alone."""
    gguf = pytest.importorskip("gguf")
    path = "model.language_model.layers.0.mlp.down_proj"
    model = model_of_paths({path: nn.Linear(8, 8)})
    model.config = {"model_type": "llava", "text_config": {"model_type": "qwen2"}}  # type: ignore[assignment]
    apply_rules(model, LoraRule(path, rank=2, init="random"))
    expected = model.get_submodule(path)(x := random(2, 8))
    save_adapter(model, tmp_path, format="gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors]
    assert names == ["blk.0.ffn_down.weight.lora_a", "blk.0.ffn_down.weight.lora_b"]
    load_adapter(remove(model), tmp_path)
    assert torch.equal(model.get_submodule(path)(x), expected)


def test_gguf_needs_the_heads_and_one_alpha(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = Llama()
    apply_rules(model, LoraRule(list(LLAMA), rank=2, alpha=8, alpha_pattern={"down_proj": 2}, init="random"))
    x = random(2, 8)
    expected = [model.get_submodule(path)(x) for path in LLAMA]
    with pytest.warns(SurgeryWarning, match="one alpha: the scale of 1 modules"):
        save_adapter(model, tmp_path / "a.gguf", format="gguf")
    load_adapter(remove(model), tmp_path / "a.gguf")
    for path, output in zip(LLAMA, expected, strict=True):
        assert torch.allclose(model.get_submodule(path)(x), output, **CLOSE)
    with pytest.raises(LoadError, match="number of attention heads is not known"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "b", format="peft")
    with pytest.raises(SurgeryError, match="gguf-llama or gguf or"):
        convert_adapter(save_adapter(model, tmp_path / "peft"), tmp_path / "b.gguf", format="gguf")
    convert_adapter(tmp_path / "peft", tmp_path / "b.gguf", format="gguf", base=model.config)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("place", [0, 8, 16, 40, 120, 300])
def test_a_damaged_gguf_file_is_refused_or_whole(tmp_path: Path, place: int) -> None:
    pytest.importorskip("gguf")
    model = apply_rules(Llama(), LoraRule(list(LLAMA), rank=2, init="random"))
    save_adapter(model, tmp_path / "a.gguf", format="gguf")
    before, content = Snapshot(remove(model)), (tmp_path / "a.gguf").read_bytes()
    for damaged in (content[:place], content[:place] + b"\xff" * 8 + content[place + 8 :]):
        (tmp_path / "b.gguf").write_bytes(damaged)
        try:
            load_adapter(model, tmp_path / "b.gguf")
            remove(model)
        except LoadError:
            pass
        assert not before.differences(model)
