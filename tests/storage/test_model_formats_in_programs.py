"""Whole models in the programs themselves: llama.cpp's converter writes the same file, and mlx-lm the same logits.

The environment variable LLAMA_CPP names a checkout of llama.cpp. mlx and mlx-lm are used where they are installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery import merge_to
from tests.support.small_decoders import IDS, adapted

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA_CPP = os.environ.get("LLAMA_CPP")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Settings beside those of all: head sizes, windows that the text exceeds, and numbers of layers that have both kinds.
_HEADS = dict(head_dim=16, query_pre_attn_scalar=16)
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 777.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 333.0},
}
_TEN_THOUSAND = {"rope_type": "default", "rope_theta": 10000.0}
_PART = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "Gemma": dict(head_dim=16, rope_parameters=_TEN_THOUSAND),
    "Gemma2": dict(_HEADS, rope_parameters=_TEN_THOUSAND),
    "Gemma3Text": dict(_HEADS, num_hidden_layers=6, sliding_window=4, rope_parameters=_TWO_ROPES),
    "Olmo3": dict(num_hidden_layers=4, sliding_window=4),
    "Exaone4": dict(num_hidden_layers=4, sliding_window=4),
    "Cohere2": dict(num_hidden_layers=4, sliding_window=4, head_dim=8, rotary_pct=1.0),
    "SmolLM3": dict(num_hidden_layers=4),
    "StableLm": dict(rope_parameters=_PART),
    "Nemotron": dict(rope_parameters=_PART),
    "Glm4": dict(rope_parameters=_PART, head_dim=8),
    "Phi": dict(rope_parameters=_PART),
    "Helium": dict(head_dim=8),
    "Starcoder2": dict(sliding_window=None),
    "GPTNeoX": dict(intermediate_size=128),
    "GPT2": dict(n_layer=2, n_head=4, n_embd=32, rope_parameters=None),
    "Mixtral": dict(num_local_experts=4),
    "Qwen2Moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}

# llama.cpp ------------------------------------------------------------------------------------------------------

ARCHITECTURES = """
Llama Mistral Qwen2 Qwen3 Granite SmolLM3 Olmo Arcee Gemma Gemma2 Olmo2 Olmo3 Exaone4 StableLm Cohere Cohere2 Nemotron
SeedOss Ernie4_5
"""
# The converter refuses folders without a tokenizer, although llama.cpp opens models without a vocabulary.
CONVERTER = """
import sys
from pathlib import Path
checkout, folder, *outputs = sys.argv[1:]
sys.path[:0] = [checkout, checkout + "/gguf-py"]
import gguf, torch
from conversion import get_model_class
from conversion.base import ModelBase, ModelType, get_model_architecture
kind = gguf.LlamaFileType
kinds = {"f32": kind.ALL_F32, "f16": kind.MOSTLY_F16, "bf16": kind.MOSTLY_BF16}
fields = ModelBase.load_hparams(Path(folder), False)
made = get_model_class(get_model_architecture(fields, ModelType.TEXT))
changes = {"set_vocab": lambda self: self._set_vocab_none(), "model_arch": made.model_arch}
without = type(made.__name__, (made,), changes)
for output in outputs:
    with torch.inference_mode():
        without(Path(folder), kinds[Path(output).stem], Path(output)).write()
"""


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("name", ARCHITECTURES.split())
def test_a_gguf_file_is_that_of_llama_cpps_converter(tmp_path: Path, name: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    settings = SETTINGS.get(name, {})
    if name == "StableLm":
        settings = dict(rope_parameters={**_PART, "rope_theta": 10000.0})
    model = adapted(name, **settings)
    folder = merge_to(model, tmp_path / "merged")
    outputs = [tmp_path / f"{dtype}.gguf" for dtype in DTYPES]
    words = [sys.executable, "-c", CONVERTER, LLAMA_CPP, folder, *outputs]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    for dtype, output in zip(DTYPES, outputs, strict=True):
        ours = gguf.GGUFReader(merge_to(model, tmp_path / dtype / "merged.gguf", format="gguf", dtype=DTYPES[dtype]))
        theirs = gguf.GGUFReader(output)
        first, second = ({tensor.name: tensor for tensor in each.tensors} for each in (ours, theirs))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.tensor_type == second[key].tensor_type and np.array_equal(tensor.data, second[key].data)
        said, meant = (
            {key: (field.types, field.contents()) for key, field in each.fields.items()} for each in (ours, theirs)
        )
        assert {key: value for key, value in said.items() if meant.get(key) != value}.keys() <= {
            f"{said['general.architecture'][1]}.vocab_size",  # without it, llama.cpp opens no model without tokens
            "GGUF.kv_count",
        }
        assert meant.keys() <= said.keys()


# mlx-lm ---------------------------------------------------------------------------------------------------------

MLX_MODELS = """
Llama Mistral Qwen2 Qwen3 Granite SmolLM3 Gemma Gemma2 Gemma3Text Olmo2 Olmo3 Cohere Cohere2 StableLm Nemotron SeedOss
Ernie4_5 Exaone4 Apertus Helium Glm4 Phi3 Phi Starcoder2 GPTNeoX GPT2 Mixtral Qwen2Moe Qwen3Moe
"""
# mlx-lm computes GELU without its approximation for these, and Gemma 3's scale of embeddings in bfloat16
ITS_OWN = {"Gemma": 1e-2, "Gemma3Text": 1e-2, "Starcoder2": 1e-3, "GPTNeoX": 2e-3}


@pytest.mark.parametrize("name", MLX_MODELS.split())
def test_mlx_lm_computes_the_models_logits(tmp_path: Path, name: str) -> None:
    mx: Any = pytest.importorskip("mlx.core")
    utils: Any = pytest.importorskip("mlx_lm.utils")
    model = adapted(name, **SETTINGS.get(name, {}))
    expected = model(IDS).logits
    loaded, _ = utils.load_model(merge_to(model, tmp_path / "m", format="mlx"))
    logits = torch.tensor(np.array(loaded(mx.array(IDS.numpy())).astype(mx.float32)))
    assert torch.allclose(logits, expected, atol=ITS_OWN.get(name, 2e-5), rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_mlx_lm_scales_rotary_embeddings_alike(tmp_path: Path, kind: str) -> None:
    mx: Any = pytest.importorskip("mlx.core")
    utils: Any = pytest.importorskip("mlx_lm.utils")
    rope = {"rope_type": kind, "rope_theta": 777.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 512} if kind != "linear" else {}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model = adapted(rope_parameters=rope)
    expected = model(IDS).logits
    loaded, _ = utils.load_model(merge_to(model, tmp_path / "m", format="mlx"))
    logits = torch.tensor(np.array(loaded(mx.array(IDS.numpy()))))
    assert torch.allclose(logits, expected, atol=2e-5, rtol=1e-5)
