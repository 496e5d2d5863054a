"""Other programs open files in their formats, and what they wrote is read. Skipped where a program is absent."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery import apply_rules, convert_adapter, load_adapter, remove, save_adapter
from surgery.rules import LohaRule, LokrRule, LoraRule
from tests.support.foreign_formats import model_of_paths, random, write

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}  # float32 sums in another order


def test_peft_opens_a_converted_file(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": random(2, 4), f"{name}.lora_up.weight": random(3, 2)}
    source = write(tmp_path / "a.safetensors", {**tensors, f"{name}.alpha": torch.tensor(5.0)})
    convert_adapter(source, tmp_path / "peft", format="peft")
    model = model_of_paths({"text_model.encoder.layers.0.mlp.fc1": nn.Linear(4, 3)})
    layer: Any = model.get_submodule("text_model.encoder.layers.0.mlp.fc1")
    before = layer(x := random(2, 4))
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    found = adapted.get_submodule("base_model.model.text_model.encoder.layers.0.mlp.fc1")(x) - before
    down, up = tensors.values()
    assert torch.allclose(found, 2.5 * x @ down.T @ up.T, **CLOSE)


# diffusers ------------------------------------------------------------------------------------------------------


def unet(xl: bool) -> Any:
    diffusers: Any = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4)
    sizes |= dict(cross_attention_dim=16, attention_head_dim=4, block_out_channels=(16, 32))
    if not xl:
        blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
        blocks |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        return diffusers.UNet2DConditionModel(**{**sizes, **blocks}).eval()
    sizes |= dict(block_out_channels=(16, 32, 32), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True)
    sizes |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    sizes |= dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    sizes |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    return diffusers.UNet2DConditionModel(**sizes).eval()


@torch.no_grad()
def image(model: Any, xl: bool) -> Tensor:
    more = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)} if xl else {}
    return model(random(1, 4, 8, 8), 3, random(1, 5, 16), added_cond_kwargs=more).sample


def by_diffusers(model: Any, folder: Path, xl: bool) -> Tensor:
    """What diffusers computes with a file."""
    loaders: Any = pytest.importorskip("diffusers.loaders")
    mixin = loaders.StableDiffusionXLLoraLoaderMixin if xl else loaders.StableDiffusionLoraLoaderMixin
    (file,) = folder.iterdir()
    tensors, alphas, metadata = mixin.lora_state_dict(
        str(folder), weight_name=file.name, unet_config=model.config, return_lora_metadata=True
    )
    mixin.load_lora_into_unet(tensors, network_alphas=alphas, unet=model, metadata=metadata)
    return image(model, xl)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("fmt", ["kohya", "diffusers", "lycoris", "diffusers-old"])
def test_diffusers_opens_what_is_saved(tmp_path: Path, fmt: str, xl: bool) -> None:
    model = unet(xl)
    other, before = copy.deepcopy(model), image(model, xl)
    targets = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj"]
    old = fmt == "diffusers-old"  # in which diffusers reads attentions alone, and no alpha
    options: dict[str, Any] = {"alpha": 2} if old else {"alpha": 3, "rank_pattern": {"to_q": 4}}
    apply_rules(model, LoraRule(targets[:2] if old else targets, rank=2, init="random", **options))
    save_adapter(model, tmp_path, format=fmt)
    expected = image(model, xl)
    assert not torch.allclose(expected, before, atol=0.01)
    assert torch.allclose(by_diffusers(other, tmp_path, xl), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_is_read_and_converted(tmp_path: Path) -> None:
    loaders: Any = pytest.importorskip("diffusers.loaders")
    peft: Any = pytest.importorskip("peft")
    model = unet(True)
    plain = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = image(model, True)
    loaders.StableDiffusionXLLoraLoaderMixin.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    assert load_adapter(plain, tmp_path / "theirs").format == "diffusers"
    assert torch.allclose(image(plain, True), expected, **CLOSE)
    convert_adapter(tmp_path / "theirs", tmp_path / "kohya/lora.safetensors", format="kohya")
    assert torch.allclose(by_diffusers(remove(plain), tmp_path / "kohya", True), expected, **CLOSE)


# MLX-LM ---------------------------------------------------------------------------------------------------------


def language_model(folder: Path) -> tuple[nn.Module, Tensor, Callable[[Path | None], Tensor]]:
    """A small Llama, its tokens, and its logits by MLX-LM, with an adapter or without."""
    mx: Any = pytest.importorskip("mlx.core")
    utils: Any = pytest.importorskip("mlx_lm.utils")
    tuner: Any = pytest.importorskip("mlx_lm.tuner.utils")
    transformers: Any = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    model.save_pretrained(folder)
    ids = torch.arange(10)[None]

    def logits(adapter: Path | None) -> Tensor:
        theirs, _ = utils.load_model(folder)
        if adapter is not None:
            tuner.load_adapters(theirs, str(adapter))
        return torch.from_numpy(np.array(theirs(mx.array(ids.tolist())).astype(mx.float32)))

    return model, ids, logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rule",
    [
        LoraRule(["q_proj", "v_proj", "down_proj"], rank=4, alpha=10, init="random"),
        LoraRule(["q_proj", "layers.2.mlp.up_proj"], rank=2, alpha=7, dora=True, init="random"),
        LoraRule(["embed_tokens", "o_proj"], rank=4, alpha=3, init="random"),
    ],
    ids=["lora", "dora", "embedding"],
)
def test_mlx_opens_what_is_saved(tmp_path: Path, rule: LoraRule) -> None:
    model, ids, logits = language_model(tmp_path / "base")
    before = model(ids).logits
    save_adapter(apply_rules(model, rule), tmp_path / "a", format="mlx")
    expected = model(ids).logits
    assert not torch.allclose(expected, before, atol=0.01)
    assert torch.allclose(logits(tmp_path / "a"), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_what_mlx_saves_is_read(tmp_path: Path) -> None:
    model, ids, logits = language_model(tmp_path / "base")
    mx: Any = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten  # type: ignore[import-not-found]
    from mlx_lm.tuner.utils import linear_to_lora_layers  # type: ignore[import-not-found]
    from mlx_lm.utils import load_model  # type: ignore[import-not-found]

    theirs, _ = load_model(tmp_path / "base")
    theirs.freeze()
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(theirs, 2, settings)
    trained = {name: mx.random.normal(value.shape) * 0.1 for name, value in tree_flatten(theirs.trainable_parameters())}
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a/adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings, "seed": 0}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    assert load_adapter(model, tmp_path / "a").format == "mlx"
    assert torch.allclose(model(ids).logits, logits(tmp_path / "a"), **CLOSE)


class TokenLists(list[list[int]]):
    """A data set as MLX-LM's trainer takes it."""

    def process(self, tokens: list[int]) -> tuple[list[int], int]:
        return tokens, 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_trains_is_read(tmp_path: Path, kind: str) -> None:
    model, ids, logits = language_model(tmp_path / "base")
    program: Any = pytest.importorskip("mlx_lm.lora")
    theirs, _ = pytest.importorskip("mlx_lm.utils").load_model(tmp_path / "base")
    changes = dict(fine_tune_type=kind, num_layers=2, iters=4, batch_size=2, learning_rate=0.02, max_seq_length=16)
    changes |= dict(adapter_path=str(tmp_path / "a"), steps_per_eval=100, seed=0, val_batches=0)
    data = TokenLists([[(7 * row + place) % 64 for place in range(12)] for row in range(4)])
    program.train_model(SimpleNamespace(**{**program.CONFIG_DEFAULTS, **changes}), theirs, data, data)
    before = model(ids).logits
    assert load_adapter(model, tmp_path / "a").format == "mlx"
    assert torch.allclose(model(ids).logits, logits(tmp_path / "a"), **CLOSE)
    assert (model(ids).logits - before).abs().max() > 1e-3


# llama.cpp ------------------------------------------------------------------------------------------------------

LLAMA_CPP = os.environ.get("LLAMA_CPP")  # a checkout, whose convert_lora_to_gguf.py runs

ARCHITECTURES = """
Llama Mistral Granite SmolLM3 Olmo Arcee Qwen2 Qwen3 Gemma Gemma2 Gemma3Text Olmo2 Olmo3 StableLm Cohere Cohere2
Nemotron SeedOss Ernie4_5 Exaone4 Apertus
"""


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES.split())
def test_gguf_is_that_of_llama_cpps_converter(tmp_path: Path, name: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    transformers: Any = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = getattr(transformers, f"{name}Config")(**sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    layers = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    apply_rules(model, LoraRule(sorted(layers - {"lm_head"}), rank=4, alpha=8, init="random"))
    save_adapter(model, tmp_path / "peft", format="peft")
    save_adapter(model, tmp_path / "ours.gguf", format="gguf")
    words = [Path(str(LLAMA_CPP)) / "convert_lora_to_gguf.py", "--base", tmp_path / "base"]
    words += ["--outfile", tmp_path / "theirs.gguf", tmp_path / "peft"]
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    first, second = ({tensor.name: np.array(tensor.data) for tensor in each.tensors} for each in (ours, theirs))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    for field in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[field].contents() == theirs.fields[field].contents()
    expected = model(ids := torch.arange(6)[None]).logits
    load_adapter(remove(model), tmp_path / "theirs.gguf")
    assert torch.equal(model(ids).logits, expected)


# LyCORIS --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 12)])
        self.conv1, self.norm1 = nn.Conv2d(4, 8, 3, padding=1), nn.LayerNorm(12)

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        return torch.cat([self.norm1(self.layers[1](self.layers[0](x))).flatten(), self.conv1(pixels).flatten()])


CALL = random(3, 16), random(1, 4, 5, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("lora", {}), ("lora", {"use_tucker": True}), ("lora", {"weight_decompose": True}), ("lora", {"rs_lora": True}),
        ("loha", {}), ("loha", {"use_tucker": True}), ("lokr", {}), ("lokr", {"factor": 4}),
        ("lokr", {"full_matrix": True}), ("lokr", {"decompose_both": True, "factor": 4}),
        ("lokr", {"use_tucker": True, "factor": 2}), ("full", {}), ("diag-oft", {}), 
    ],
)  # fmt: skip
def test_what_lycoris_saves_is_read(tmp_path: Path, algo: str, options: dict[str, Any]) -> None:
    lycoris: Any = pytest.importorskip("lycoris")
    model, plain = (made := Small().eval()), copy.deepcopy(made)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, 2, 3.0, algo=algo, conv_dim=2, conv_alpha=1.0, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "a.safetensors")
    before = plain(*CALL)
    assert load_adapter(plain, tmp_path / "a.safetensors").format == "lycoris"
    assert not torch.allclose(plain(*CALL), before, atol=0.01)
    assert torch.allclose(plain(*CALL), model(*CALL), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("algo", "options"), [("boft", {}), ("boft", {"rescaled": True}), ("glora", {})])
def test_methods_of_lycoris_for_linears(tmp_path: Path, algo: str, options: dict[str, Any]) -> None:
    lycoris: Any = pytest.importorskip("lycoris")
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 24))
    plain, x = copy.deepcopy(model), random(3, 6)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, 8, 3.0, algo=algo, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "a.safetensors")
    before = plain(x)
    load_adapter(plain, tmp_path / "a.safetensors")
    assert not torch.allclose(plain(x), before, atol=0.01)
    assert torch.allclose(plain(x), model(x), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [LoraRule, LohaRule, LokrRule])
def test_lycoris_opens_what_is_saved(tmp_path: Path, kind: Any) -> None:
    lycoris: Any = pytest.importorskip("lycoris")
    model, plain = (made := Small().eval()), copy.deepcopy(made)
    apply_rules(model, kind(["layers.0", "layers.1", "conv1"], rank=2, alpha=3, init="random"))
    save_adapter(model, tmp_path / "a.safetensors", format="lycoris")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), plain)
    network.apply_to()
    assert torch.allclose(plain(*CALL), model(*CALL), **CLOSE)
