"""llama.cpp's names of the modules of transformers' models, by the kinds of layers that they have."""

from __future__ import annotations

from surgery.storage.formats.architectures import name_rows
from surgery.storage.formats.module_names import register_module_names
from surgery.storage.formats.table import ModuleNames, NameRow

__all__: list[str] = []

_LAYER = """
    attn_v       self_attn.v_proj
    attn_output  self_attn.o_proj
    attn_qkv     self_attn.qkv_proj
    ffn_gate     mlp.gate_proj
    ffn_up       mlp.up_proj
    ffn_down     mlp.down_proj
    attn_q_norm  self_attn.q_norm
    attn_k_norm  self_attn.k_norm
"""
_HEADS = "attn_q self_attn.q_proj\nattn_k self_attn.k_proj"
_TURNED_HEADS = (
    NameRow("blk.{n}.attn_q", ("model.layers.{n}.self_attn.q_proj",), rows="query_heads"),
    NameRow("blk.{n}.attn_k", ("model.layers.{n}.self_attn.k_proj",), rows="key_heads"),
)
_ENDS = (
    NameRow("token_embd", ("model.embed_tokens",), embedding=True),
    NameRow("output_norm", ("model.norm",)),
    NameRow("output", ("lm_head",)),
)
# Where the norms of a layer stand: before its two halves, after them, or both.
_NORMS_BEFORE = """
    attn_norm  input_layernorm
    ffn_norm   post_attention_layernorm
"""
_NORMS_AFTER = """
    post_attention_norm  post_attention_layernorm
    post_ffw_norm        post_feedforward_layernorm
"""
_NORMS_AROUND = _NORMS_AFTER + """
    attn_norm  input_layernorm
    ffn_norm   pre_feedforward_layernorm
"""  # fmt: skip
_NORMS_OF_APERTUS = """
    attn_norm  attention_layernorm
    ffn_norm   feedforward_layernorm
"""
_NORMS_OF_SEED_OSS = """
    attn_norm            input_layernorm
    post_attention_norm  post_attention_layernorm
"""
_MARKS = (r"blk\.\d", r"token_embd$", r"output$", r"output_norm$")
_OWN_MARKS = (r"^model\.layers\.\d+\.", r"^(lm_head|model\.embed_tokens|model\.norm)$")


def _register(name: str, types: dict[str, str], norms: str, turned: bool = False) -> None:
    """Registers the names of models: types of transformers → how the header of a GGUF file calls them."""
    heads = _TURNED_HEADS if turned else name_rows(_HEADS, "blk.{n}.", "model.layers.{n}.")
    layer = name_rows(_LAYER + norms, "blk.{n}.", "model.layers.{n}.")
    register_module_names(
        ModuleNames(
            name,
            (*heads, *layer, *_ENDS),
            marks=_MARKS,
            own_marks=_OWN_MARKS,
            model_types=tuple(types),
            header_names=tuple(types.values()),
        )
    )


def _same(types: str) -> dict[str, str]:
    return {each: each for each in types.split()}


# llama.cpp: conversion of models; classes that inherit from its LlamaModel permute the rows of query and key heads
_TURNED = {"mistral": "llama", **_same("llama smollm3 granite olmo arcee")}
_register("gguf-llama", _TURNED, _NORMS_BEFORE, turned=True)
_PLAIN = {"cohere": "command-r", **_same("qwen2 qwen3 gemma stablelm cohere2 nemotron ernie4_5")}
_register("gguf", _PLAIN, _NORMS_BEFORE)
_register("gguf-seed-oss", _same("seed_oss"), _NORMS_OF_SEED_OSS)
_register("gguf-around", {"gemma2": "gemma2", "gemma3_text": "gemma3"}, _NORMS_AROUND)
_register("gguf-after", {"olmo2": "olmo2", "olmo3": "olmo2", "exaone4": "exaone4"}, _NORMS_AFTER)
_register("gguf-apertus", {"apertus": "apertus"}, _NORMS_OF_APERTUS)
