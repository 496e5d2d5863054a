"""LyCORIS, ComfyUI, XLabs, Black Forest Labs, torchtune and OpenVINO: the change is that of the file's tensors."""

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
    apply_rules,
    convert_adapter,
    load_adapter,
    remove,
    save_adapter,
)
from surgery.rules import LokrRule, LoraRule
from tests.support.foreign_formats import change_of, low_rank, model_of_paths, random, same, write

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}  # float32 sums in another order


def check(model: nn.Module, file: Path, path: str, delta: Tensor, fmt: str) -> Any:
    """Loads a file, and compares one module's change with Δ; returns the report."""
    base = copy.deepcopy(model)
    report = load_adapter(model, file)
    assert report.format == fmt
    module = base.get_submodule(path)
    if isinstance(module, nn.Conv2d):
        x = random(1, module.in_channels, 4, 4)
        expected = nn.functional.conv2d(x, delta, padding=module.padding)  # type: ignore[arg-type]
    else:
        x = random(2, module.in_features)  # type: ignore[arg-type]
        expected = x @ delta.T
    assert torch.allclose(change_of(model, path, x, base), expected, **CLOSE)
    return report


# LyCORIS ------------------------------------------------------------------------------------------------------

LAYERS = "lycoris_blocks_0_to_q"


def loha() -> tuple[dict[str, Tensor], Tensor]:
    tensors = {f"{LAYERS}.hada_{name}": random(*size) for name, size in
               {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8)}.items()}  # fmt: skip
    w1_a, w1_b, w2_a, w2_b = tensors.values()
    return {**tensors, f"{LAYERS}.alpha": torch.tensor(1.0)}, 0.5 * (w1_a @ w1_b) * (w2_a @ w2_b)


def lokr(low: bool) -> tuple[dict[str, Tensor], Tensor]:
    w1 = random(2, 2)
    if low:
        a, b = random(3, 1), random(1, 4)
        tensors = {f"{LAYERS}.lokr_w1": w1, f"{LAYERS}.lokr_w2_a": a, f"{LAYERS}.lokr_w2_b": b}
        return {**tensors, f"{LAYERS}.alpha": torch.tensor(0.5)}, 0.5 * torch.kron(w1, a @ b)
    tensors = {f"{LAYERS}.lokr_w1": w1, f"{LAYERS}.lokr_w2": random(3, 4), f"{LAYERS}.alpha": torch.tensor(7.0)}
    return tensors, torch.kron(w1, random(3, 4))  # of factors in full the scale is 1


def glora() -> tuple[dict[str, Tensor], Tensor]:
    sizes = {"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)}
    tensors = {f"{LAYERS}.{name}.weight": random(*size) for name, size in sizes.items()}
    a1, a2, b1, b2 = tensors.values()
    return {**tensors, f"{LAYERS}.alpha": torch.tensor(1.0)}, 0.5 * (random(6, 8) @ a1 @ a2 + b1 @ b2)


def oft(bound: float) -> tuple[dict[str, Tensor], Tensor]:
    blocks = random(2, 3, 3)
    turn = blocks - blocks.transpose(1, 2)
    norm = float(turn.norm())
    turn = turn * (bound * 6 / norm) if 0 < bound * 6 < norm else turn
    rotation = torch.block_diag(*((torch.eye(3) + one) @ torch.linalg.inv(torch.eye(3) - one) for one in turn))
    weight = random(6, 8)
    return {f"{LAYERS}.oft_blocks": blocks, f"{LAYERS}.alpha": torch.tensor(bound)}, rotation.T @ weight - weight


def full() -> tuple[dict[str, Tensor], Tensor]:
    return {f"{LAYERS}.diff": random(6, 8)}, random(6, 8)


def locon() -> tuple[dict[str, Tensor], Tensor]:
    tensors = low_rank(LAYERS, 6, 8, 4, 2.0)
    return tensors, 0.5 * tensors[f"{LAYERS}.lora_up.weight"] @ tensors[f"{LAYERS}.lora_down.weight"]


LYCORIS: dict[str, Any] = {
    "loha": loha, "lokr": lambda: lokr(False), "lokr low": lambda: lokr(True), "full": full, "locon": locon,
    "glora": glora, "oft": lambda: oft(0.0), "bounded oft": lambda: oft(0.01),
}  # fmt: skip


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(tmp_path: Path, kind: str) -> None:
    tensors, delta = LYCORIS[kind]()
    model = model_of_paths({"blocks.0.to_q": nn.Linear(8, 6)})
    model.get_submodule("blocks.0.to_q").weight.data.copy_(random(6, 8))  # type: ignore[union-attr, operator]
    check(model, write(tmp_path / "a.safetensors", tensors), "blocks.0.to_q", delta, "lycoris")
    if kind in ("loha", "lokr", "lokr low", "locon"):
        save_adapter(model, tmp_path / "out", format="lycoris")
        written = load_file(tmp_path / "out/lycoris.safetensors")
        assert same(written, tensors, leave=[".alpha"] if kind == "lokr" else [])


def test_lycoris_mixes_methods(tmp_path: Path) -> None:
    """LoHa, LoKr of a kernel with a Tucker core, a difference with a bias, and a norm in one file."""
    layers = {"blocks.0.to_q": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3, padding=1), "out": nn.Linear(3, 5),
              "norm": nn.LayerNorm(8), "last": nn.Linear(4, 2)}  # fmt: skip
    model = model_of_paths(layers)
    tensors, delta = loha()
    names = {"w1_a": (2, 6), "w1_b": (2, 4), "w2_a": (2, 6), "w2_b": (2, 4), "t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)}
    tensors |= {f"lycoris_conv.hada_{name}": random(*size, seed=3) for name, size in names.items()}
    tensors |= {"lycoris_out.diff": random(5, 3), "lycoris_out.diff_b": random(5)}
    tensors |= {"lycoris_norm.w_norm": random(8), "lycoris_norm.b_norm": random(8, seed=1)}
    tensors |= {"lycoris_last.diff_b": random(2)}
    base = copy.deepcopy(model)
    report = check(model, write(tmp_path / "a.safetensors", tensors), "blocks.0.to_q", delta, "lycoris")
    assert sorted({rule.label for rule in report.rules}) == ["LohaRule", "LoraRule", "NormRule"]
    parts = []
    for number in "12":
        t, a, b = (tensors[f"lycoris_conv.hada_{name}"] for name in (f"t{number}", f"w{number}_a", f"w{number}_b"))
        parts.append(torch.einsum("ijkl,jr,ip->prkl", t, b, a))
    x = random(1, 4, 4, 4)
    expected = nn.functional.conv2d(x, parts[0] * parts[1], padding=1)
    assert torch.allclose(change_of(model, "conv", x, base), expected, **CLOSE)
    change = change_of(model, "out", x := random(2, 3), base)
    assert torch.allclose(change, x @ tensors["lycoris_out.diff"].T + tensors["lycoris_out.diff_b"], **CLOSE)
    assert torch.allclose(change_of(model, "last", random(2, 4), base), tensors["lycoris_last.diff_b"], **CLOSE)
    normed = nn.functional.layer_norm(x := random(2, 8), (8,))
    expected = normed * tensors["lycoris_norm.w_norm"] + tensors["lycoris_norm.b_norm"]
    assert torch.allclose(change_of(model, "norm", x, base), expected, **CLOSE)


@pytest.mark.parametrize("key", ["oft_blocks", "a1.weight", "dora_scale"])
def test_what_lycoris_has_and_no_rule_is_refused(tmp_path: Path, key: str) -> None:
    tensors, _ = loha()
    tensors[f"{LAYERS}.{key}"] = random(6, 1)
    with pytest.raises(LoadError, match=key.replace(".", r"\.")):
        load_adapter(model_of_paths({"blocks.0.to_q": nn.Linear(8, 6)}), write(tmp_path / "a.safetensors", tensors))


def test_boft_turns_pairs_that_lie_apart(tmp_path: Path) -> None:
    """Each stage of BOFT is an orthogonal matrix: blocks on rows that a permutation brings together."""
    layer = nn.Linear(8, 16)
    model, weight = model_of_paths({"blocks.0.to_q": layer}), layer.weight.detach().clone()
    blocks = random(3, 4, 4, 4) * 0.2
    expected = weight
    for stage, block in enumerate(blocks - blocks.transpose(-1, -2)):
        rotation = torch.block_diag(*((torch.eye(4) + one) @ torch.linalg.inv(torch.eye(4) - one) for one in block))
        apart = 2 * 2**stage
        rows = [
            start + half * apart + at for start in range(0, 16, 2 * apart) for at in range(apart) for half in (0, 1)
        ]
        gather = torch.eye(16)[rows]
        expected = gather.T @ rotation @ gather @ expected
    check(model, write(tmp_path / "a.safetensors", {f"{LAYERS}.oft_blocks": blocks}), "blocks.0.to_q",
          expected - weight, "lycoris")  # fmt: skip


def test_lokr_of_other_divisors_is_loaded_as_lora(tmp_path: Path) -> None:
    """LyCORIS exchanges the factors of a size where the first is the larger one; PEFT's LoKr does not."""
    w1, a, b = random(2, 1), random(3, 1), random(1, 8)
    tensors = {f"{LAYERS}.lokr_w1": w1, f"{LAYERS}.lokr_w2_a": a, f"{LAYERS}.lokr_w2_b": b}
    tensors[f"{LAYERS}.alpha"] = torch.tensor(2.0)
    model = model_of_paths({"blocks.0.to_q": nn.Linear(8, 6)})
    file = write(tmp_path / "a.safetensors", tensors)
    report = check(model, file, "blocks.0.to_q", 2.0 * torch.kron(w1, a @ b), "lycoris")
    assert any("is loaded as LoRA" in text for text in report.assumed) and report.rules[0].label == "LoraRule"


def test_a_scale_of_lokr_in_full_is_told(tmp_path: Path) -> None:
    model = apply_rules(model_of_paths({"a": nn.Linear(4, 4)}), LokrRule("a", rank=2, alpha=3, init="random"))
    x = random(2, 4)
    expected = model.get_submodule("a")(x)
    with pytest.warns(SurgeryWarning, match="it is multiplied into lokr_w1, at a"):
        save_adapter(model, tmp_path, format="lycoris")
    load_adapter(remove(model), tmp_path)
    assert torch.allclose(model.get_submodule("a")(x), expected, **CLOSE)


def test_lycoris_to_peft_and_back(tmp_path: Path) -> None:
    for number, made in enumerate((loha(), lokr(True))):
        tensors = {
            key.replace("lycoris_blocks_0_to_q", "lycoris_layers_0_to_q"): value for key, value in made[0].items()
        }
        source = write(tmp_path / f"{number}.safetensors", tensors)
        convert_adapter(source, tmp_path / f"peft{number}", format="peft")
        config = json.loads((tmp_path / f"peft{number}/adapter_config.json").read_text())
        assert config["peft_type"] == ("LOHA", "LOKR")[number]
        convert_adapter(tmp_path / f"peft{number}", tmp_path / "back.safetensors", format="lycoris")
        assert same(load_file(tmp_path / "back.safetensors"), tensors)


# Flux in other spellings --------------------------------------------------------------------------------------

FLUX = {f"transformer_blocks.0.attn.to_{name}": nn.Linear(4, 4) for name in "qkv"}


def fused(name: str, down: str, up: str) -> tuple[dict[str, Tensor], Tensor]:
    A, B = random(2, 4), random(12, 2)
    return {f"{name}{down}": A, f"{name}{up}": B}, (B @ A)[4:8]


@pytest.mark.parametrize(
    ("fmt", "name", "down", "up"),
    [
        ("xlabs", "double_blocks.0.processor.qkv_lora1", ".down.weight", ".up.weight"),
        ("bfl", "double_blocks.0.img_attn.qkv", ".lora_A.weight", ".lora_B.weight"),
        ("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv", ".lora_A.weight", ".lora_B.weight"),
        ("comfyui", "diffusion_model.double_blocks.0.img_attn.qkv", ".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_flux_in_other_spellings(tmp_path: Path, fmt: str, name: str, down: str, up: str) -> None:
    tensors, delta = fused(name, down, up)
    model = model_of_paths(copy.deepcopy(FLUX))
    model.config = {"_class_name": "FluxTransformer2DModel"}  # type: ignore[assignment]
    check(model, write(tmp_path / "a.safetensors", tensors), "transformer_blocks.0.attn.to_k", delta, fmt)
    save_adapter(model, tmp_path / "out.safetensors", format=fmt, component="transformer")
    written = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
               for key, value in load_file(tmp_path / "out.safetensors").items()}  # fmt: skip
    expected = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in tensors.items()
    }
    assert same(written, expected, leave=[".alpha"])


def test_bfl_sets_norms_whole(tmp_path: Path) -> None:
    tensors, delta = fused("double_blocks.0.img_attn.qkv", ".lora_A.weight", ".lora_B.weight")
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = random(4)
    tensors |= {"img_in.lora_A.weight": random(2, 4), "img_in.lora_B.weight": random(4, 2)}
    tensors |= {"img_in.lora_B.bias": random(4)}
    layers = {"transformer_blocks.0.attn.norm_q": nn.RMSNorm(4), "x_embedder": nn.Linear(4, 4)}
    model = model_of_paths({**copy.deepcopy(FLUX), **layers})
    base = copy.deepcopy(model)
    check(model, write(tmp_path / "a.safetensors", tensors), "transformer_blocks.0.attn.to_k", delta, "bfl")
    x = random(2, 4)
    expected = nn.functional.rms_norm(x, (4,), random(4))
    assert torch.allclose(model.get_submodule("transformer_blocks.0.attn.norm_q")(x), expected, **CLOSE)
    expected = x @ (random(4, 2) @ random(2, 4)).T + random(4)
    assert torch.allclose(change_of(model, "x_embedder", x, base), expected, **CLOSE)


# Language models ----------------------------------------------------------------------------------------------


def test_torchtune_has_pairs_in_heads(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    model = model_of_paths({path: nn.Linear(8, 8), "lm_head": nn.Linear(8, 5)})
    model.config = {"model_type": "llama", "num_attention_heads": 2}  # type: ignore[assignment]
    A, B = random(2, 8), random(8, 2)
    tensors = {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B}
    tensors |= {"output.lora_a.weight": random(2, 8), "output.lora_b.weight": random(5, 2)}
    write(tmp_path / "in/adapter_0.safetensors", tensors)
    with pytest.raises(LoadError, match="the scale is not known"):
        load_adapter(model, tmp_path / "in")
    (tmp_path / "in/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    halves = B.view(2, 2, 2, 2).transpose(1, 2).reshape(8, 2)  # heads, pairs, two of a pair
    check(model, tmp_path / "in", path, 3.0 * halves @ A, "torchtune")
    save_adapter(model, tmp_path / "out", format="torchtune")
    assert same(load_file(tmp_path / "out/adapter_0.safetensors"), tensors)


def test_openvino_multiplies_by_no_alpha(tmp_path: Path) -> None:
    model = model_of_paths({"model.q_proj": nn.Linear(4, 4)})
    base, x = copy.deepcopy(model), random(2, 4)
    apply_rules(model, LoraRule("q_proj", rank=2, alpha=3, init="random"))
    with pytest.warns(SurgeryWarning, match="no scale"):
        save_adapter(model, tmp_path, format="openvino")
    tensors = load_file(tmp_path / "openvino_lora.safetensors")
    start = "base_model.model.model.q_proj.lora_"
    expected = x @ (tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]).T
    assert torch.allclose(change_of(model, "model.q_proj", x, base), expected, **CLOSE)
    report = load_adapter(base, tmp_path / "openvino_lora.safetensors", format="openvino")
    assert "the format does not have a scale: it is 1" in report.assumed


def test_onnxruntime_genai_has_the_scale_in_b(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    path = "model.layers.0.self_attn.q_proj"
    model = model_of_paths({path: nn.Linear(4, 6)})
    base, x = copy.deepcopy(model), random(2, 4)
    apply_rules(model, LoraRule("q_proj", rank=2, alpha=8, init="random"))
    with pytest.warns(SurgeryWarning, match="no scale"):
        save_adapter(model, tmp_path, format="onnxruntime-genai")
    values = runtime.AdapterFormat.read_adapter(str(tmp_path / "adapter.onnx_adapter")).get_parameters()
    A, B = (values[f"model.layers.0.attn.q_proj.lora_{name}.MatMul.weight"].numpy() for name in "AB")
    expected = x @ torch.from_numpy(A) @ torch.from_numpy(B)  # as the graph multiplies
    assert torch.allclose(change_of(model, path, x, base), expected, **CLOSE)
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path).format == "onnxruntime-genai"
    assert torch.allclose(change_of(again, path, x, base), expected, **CLOSE)
    (tmp_path / "adapter.onnx_adapter").write_bytes(b"damaged" * 20)
    with pytest.raises(LoadError, match="is damaged"):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_embeddings_of_the_base_are_left_to_the_model(tmp_path: Path) -> None:
    tensors = {"base_model.model.embed_tokens.base_layer.weight": random(8, 4)}
    tensors |= {
        f"base_model.model.embed_tokens.lora_embedding_{n}": random(*s)
        for n, s in zip("AB", ((2, 8), (4, 2)), strict=True)
    }
    write(tmp_path / "a/adapter_model.safetensors", tensors)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(LoadError, match="embeddings of the base"):
        convert_adapter(tmp_path / "a", tmp_path / "b", format="mlx")


def test_paths_of_before_transformers_5(tmp_path: Path) -> None:
    """A model's text model moved; MLX's file of the old path is read at the new one."""
    path = "language_model.model.layers.0.self_attn.q_proj"
    write(tmp_path / "adapters.safetensors", {f"{path}.lora_a": random(4, 2), f"{path}.lora_b": random(2, 6)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2, "scale": 2.0}}))
    here = "model.language_model.layers.0.self_attn.q_proj"
    report = check(
        model_of_paths({here: nn.Linear(4, 6)}), tmp_path, here, 2.0 * (random(4, 2) @ random(2, 6)).T, "mlx"
    )
    assert any(f"such as {path} for {here}" in text for text in report.assumed)


class SD3Transformer2DModel(nn.Module):
    """The names of diffusers' model, without its forward."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"transformer_blocks.0.norm1_context.linear": 24, "transformer_blocks.1.norm1_context.linear": 8}
        inner = model_of_paths({path: nn.Linear(4, size) for path, size in sizes.items()})
        self.add_module("transformer_blocks", inner.get_submodule("transformer_blocks"))
        self.config = {"num_attention_heads": 2, "attention_head_dim": 2, "_class_name": "SD3Transformer2DModel"}


def test_the_last_context_of_sd3_has_shift_and_scale_in_another_order(tmp_path: Path) -> None:
    """ComfyUI's mmdit_to_diffusers exchanges the halves of the last block alone."""
    names = [f"joint_blocks_{block}_context_block_adaLN_modulation_1" for block in (0, 1)]
    tensors = low_rank(f"lora_unet_{names[0]}", 24, 4, 2, 2.0) | low_rank(f"lora_unet_{names[1]}", 8, 4, 2, 2.0)
    file, model, x = write(tmp_path / "a.safetensors", tensors), SD3Transformer2DModel(), random(2, 4)
    base = copy.deepcopy(model)
    load_adapter(model, file)
    for block, name in enumerate(names):
        up, down = (tensors[f"lora_unet_{name}.lora_{half}.weight"] for half in ("up", "down"))
        expected = x @ (up.roll(4, 0) if block else up).mm(down).T
        found = change_of(model, f"transformer_blocks.{block}.norm1_context.linear", x, base)
        assert torch.allclose(found, expected, **CLOSE)
    save_adapter(model, tmp_path / "out.safetensors", format="kohya")
    assert same(load_file(tmp_path / "out.safetensors"), tensors)
    with pytest.raises(LoadError, match="width of the model is not known"):
        convert_adapter(file, tmp_path / "b", format="diffusers")


def test_comfyui_has_kohyas_names_for_a_unet(tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    model = model_of_paths({path: nn.Linear(4, 4)})
    apply_rules(model, LoraRule(path, rank=2, alpha=3, init="random"))
    save_adapter(model, tmp_path / "a.safetensors", format="comfyui", component="unet")
    assert f"lora_unet_{path.replace('.', '_')}.lora_down.weight" in load_file(tmp_path / "a.safetensors")
    expected = model.get_submodule(path)(x := random(2, 4))
    assert load_adapter(remove(model), tmp_path / "a.safetensors").format == "kohya"
    assert torch.equal(model.get_submodule(path)(x), expected)


def test_old_diffusers(tmp_path: Path) -> None:
    paths = ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "mid.proj")
    model = model_of_paths({path: nn.Linear(4, 4) for path in paths})
    apply_rules(model, LoraRule(list(paths), rank=2, alpha=2, init="random"))
    save_adapter(model, tmp_path, format="diffusers-old", component="unet")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert "unet.down_blocks.0.attn1.processor.to_out_lora.down.weight" in tensors
    base = model_of_paths({path: nn.Linear(4, 4) for path in paths})
    again, x = copy.deepcopy(base), random(2, 4)
    assert load_adapter(again, tmp_path).format == "diffusers-old"
    for path in paths:
        found = change_of(again, path, x, base)
        wanted = model.get_submodule(path)(x) - nn.functional.linear(x, *model.get_submodule(path)._parameters.values())  # type: ignore[arg-type]
        assert torch.allclose(found, wanted, **CLOSE)


def test_unknown_words(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="there is no format 'safetensors'"):
        convert_adapter(write(tmp_path / "a.safetensors", locon()[0]), tmp_path / "b", format="safetensors")


@pytest.mark.parametrize("fmt", ["openvino", "kohya", "lycoris", "comfyui"])
def test_a_table_of_embeddings_is_written_where_programs_read_one(tmp_path: Path, fmt: str) -> None:
    """OpenVINO GenAI warns and goes on without such tensors; ComfyUI adds them to the table in another order."""
    model = model_of_paths({"embed_tokens": nn.Embedding(8, 4), "to_q": nn.Linear(4, 4)})
    apply_rules(model, LoraRule(["embed_tokens", "to_q"], rank=2, init="random"))
    component = None if fmt == "openvino" else "transformer"
    with pytest.raises(SurgeryError, match="no place for a change of a table of embeddings"):
        save_adapter(model, tmp_path / "a.safetensors", format=fmt, component=component)
    assert not list(tmp_path.iterdir())


def test_torchtune_has_one_rank_and_one_alpha(tmp_path: Path) -> None:
    """Its recipes pass over rank_pattern and alpha_pattern."""
    model = model_of_paths({f"model.layers.0.mlp.{name}_proj": nn.Linear(4, 4) for name in ("gate", "up", "down")})
    apply_rules(model, LoraRule(["gate_proj", "up_proj"], rank=2, alpha=4, alpha_pattern={"up_proj": 3}, init="random"))
    with pytest.warns(SurgeryWarning, match="one alpha: the scale of 1 modules"):
        save_adapter(model, tmp_path / "a", format="torchtune")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["lora_alpha"] in (3, 4) and not settings["alpha_pattern"]
    apply_rules(remove(model), LoraRule(["gate_proj", "up_proj"], rank=2, rank_pattern={"up_proj": 3}, init="random"))
    with pytest.raises(SurgeryError, match="one rank for all modules"):
        save_adapter(model, tmp_path / "b", format="torchtune")
