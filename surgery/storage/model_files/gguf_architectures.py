"""What llama.cpp's files say of a model, by its architecture: fields of the header, and how tensors differ.

Source: llama.cpp, conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.storage.model_files.gguf_checks import CHECKS

__all__ = ["FieldRow", "GgufArchitecture", "architecture_of"]


@dataclass(frozen=True)
class FieldRow:
    """A field of the header: its key after the architecture's name, its type, and where its value comes from.

    `source`: names in the configuration, of which the first that it has counts; "=name" is a function in
    `gguf_values.py`, and "#value" a constant. Of two rows with one key the last counts.
    """

    key: str
    type: str
    source: tuple[str, ...]


def _rows(text: str) -> tuple[FieldRow, ...]:
    lines = (line.split() for line in text.splitlines() if line.strip())
    return tuple(FieldRow(key, kind, tuple(source)) for key, kind, *source in lines)


_SIZES = """
    block_count             uint32   num_hidden_layers
    context_length          uint32   max_position_embeddings
    embedding_length        uint32   hidden_size
    feed_forward_length     uint32   intermediate_size
    attention.head_count    uint32   num_attention_heads
    attention.head_count_kv uint32   num_key_value_heads
"""
_EPSILONS = """
    attention.layer_norm_rms_epsilon float32 rms_norm_eps norm_eps
    attention.layer_norm_epsilon     float32 layer_norm_eps layer_norm_epsilon norm_epsilon
"""
_HEAD_SIZE = """
    attention.key_length   uint32 head_dim
    attention.value_length uint32 head_dim
"""
_ROPE = """
    rope.freq_base                   float32 =rope_theta
    rope.freq_base_swa               float32 =rope_theta_of_windows
    rope.scaling.type                string  =rope_scaling_type
    rope.scaling.factor              float32 =rope_scaling_factor
    rope.scaling.original_context_length uint32  =yarn_original_context
    rope.scaling.yarn_attn_factor    float32 =yarn_attention_factor
    rope.scaling.yarn_beta_fast      float32 =yarn_beta_fast
    rope.scaling.yarn_beta_slow      float32 =yarn_beta_slow
"""
_COMMON = _SIZES + _EPSILONS + _HEAD_SIZE + _ROPE
_HEADS = """
    vocab_size           uint32 vocab_size
    rope.dimension_count uint32 =head_size
"""
_GEMMA = _SIZES + _HEAD_SIZE + "attention.layer_norm_rms_epsilon float32 rms_norm_eps"
_WINDOWS = """
    attention.sliding_window         uint32 sliding_window
    attention.sliding_window_pattern bools  =window_pattern
"""


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    `names`: the `ModuleNames` of its tensors. `activations`: those of transformers that llama.cpp computes for it.
    `unsaid`: fields of the configuration with the values that llama.cpp takes them to have. `checks`: functions in
    `gguf_checks.py` for what llama.cpp computes in one way alone. `shifted_norms`: norms are stored with 1 added.
    `dropped`: endings of tensors that llama.cpp does not have; they have to be zeros. `rope_factors`: Llama 3's factors
    of rotary embeddings are a tensor of the file.
    """

    name: str
    model_class: str
    names: str
    fields: tuple[FieldRow, ...]
    activations: tuple[str, ...] = ("silu",)
    unsaid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    checks: tuple[str, ...] = ()
    shifted_norms: bool = False
    dropped: tuple[str, ...] = ()
    rope_factors: bool = False


_LLAMA = _rows(_COMMON + _HEADS)
_GELU = ("gelu_pytorch_tanh",)
_RELU_2 = ("relu2",)
_NO_WINDOWS = (("use_sliding_window", (False,)),)
_TIED = (("tie_word_embeddings", (True,)),)  # llama.cpp has no other head
_BY_TYPE: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", "gguf-llama", _LLAMA, rope_factors=True),
    "mistral": GgufArchitecture("llama", "MistralForCausalLM", "gguf-llama", _LLAMA, rope_factors=True),
    "granite": GgufArchitecture(
        "granite",
        "GraniteForCausalLM",
        "gguf-llama",
        _rows(
            _SIZES + _EPSILONS + _ROPE + """
            vocab_size           uint32  vocab_size
            rope.dimension_count uint32  =head_size_by_width
            attention.scale      float32 attention_multiplier
            embedding_scale      float32 embedding_multiplier
            residual_scale       float32 residual_multiplier
            logit_scale          float32 logits_scaling
            """
        ),
        checks=("head_size",),
        rope_factors=True,
    ),
    "smollm3": GgufArchitecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        "gguf-llama",
        _LLAMA,
        unsaid=_NO_WINDOWS,
        checks=("every_fourth_layer_without_rope",),
        rope_factors=True,
    ),
    "olmo": GgufArchitecture(
        "olmo",
        "OlmoForCausalLM",
        "gguf-llama",
        _rows(_COMMON + "attention.layer_norm_epsilon float32 #1e-5\nattention.clamp_kqv float32 clip_qkv"),
    ),
    "arcee": GgufArchitecture("arcee", "ArceeForCausalLM", "gguf-llama", _LLAMA, _RELU_2, rope_factors=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", "gguf", _rows(_COMMON), unsaid=_NO_WINDOWS),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", "gguf", _rows(_COMMON), unsaid=_NO_WINDOWS),
    "gemma": GgufArchitecture(
        "gemma",
        "GemmaForCausalLM",
        "gguf",
        _rows(_GEMMA),
        _GELU,
        unsaid=_TIED,
        checks=("default_rope",),
        shifted_norms=True,
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        "gguf-around",
        _rows(
            _GEMMA + """
            attn_logit_softcapping   float32 attn_logit_softcapping
            final_logit_softcapping  float32 final_logit_softcapping
            attention.sliding_window uint32  sliding_window
            """
        ),
        _GELU,
        unsaid=_TIED,
        checks=("default_rope", "scale_by_head_size", "every_second_layer_in_full"),
        shifted_norms=True,
    ),
    "gemma3_text": GgufArchitecture(
        "gemma3",
        "Gemma3ForCausalLM",
        "gguf-around",
        _rows(
            _COMMON + """
            final_logit_softcapping  float32 final_logit_softcapping
            attention.sliding_window uint32  sliding_window
            """
        ),
        _GELU,
        unsaid=(*_TIED, ("attn_logit_softcapping", (None,)), ("use_bidirectional_attention", (False, None))),
        checks=("scale_by_head_size", "every_sixth_layer_in_full"),
        shifted_norms=True,
    ),
    "olmo2": GgufArchitecture("olmo2", "Olmo2ForCausalLM", "gguf-after", _rows(_COMMON)),
    "olmo3": GgufArchitecture("olmo2", "Olmo3ForCausalLM", "gguf-after", _rows(_COMMON + _WINDOWS)),
    "exaone4": GgufArchitecture(
        "exaone4",
        "Exaone4ForCausalLM",
        "gguf-after",
        _rows(_COMMON + _WINDOWS + "vocab_size uint32 vocab_size"),
        rope_factors=True,
    ),
    "stablelm": GgufArchitecture(
        "stablelm",
        "StableLmForCausalLM",
        "gguf",
        _rows(
            _SIZES + """
            rope.dimension_count         uint32  =rotary_size
            use_parallel_residual        bool    use_parallel_residual
            attention.layer_norm_epsilon float32 layer_norm_eps
            """
        ),
        checks=("default_rope",),
    ),
    "cohere": GgufArchitecture(
        "command-r",
        "CohereForCausalLM",
        "gguf",
        _rows(_COMMON + "logit_scale float32 logit_scale\nrope.scaling.type string #none"),
        unsaid=(*_TIED, ("attention_bias", (False,))),
        checks=("unscaled_rope",),
    ),
    "cohere2": GgufArchitecture(
        "cohere2",
        "Cohere2ForCausalLM",
        "gguf",
        _rows(
            _COMMON + """
            logit_scale              float32 logit_scale
            attention.sliding_window uint32  sliding_window
            vocab_size               uint32  vocab_size
            rope.dimension_count     uint32  =rotary_size_of_cohere
            rope.scaling.type        string  #none
            """
        ),
        unsaid=_TIED,
        checks=("unscaled_rope", "every_fourth_layer_in_full"),
        dropped=(".bias",),
    ),
    "nemotron": GgufArchitecture(
        "nemotron",
        "NemotronForCausalLM",
        "gguf",
        _rows(
            _COMMON + """
            vocab_size                   uint32  vocab_size
            attention.layer_norm_epsilon float32 norm_eps
            rope.dimension_count         uint32  =rotary_size
            rope.scaling.type            string  #none
            """
        ),
        _RELU_2,
        checks=("unscaled_rope",),
        shifted_norms=True,
    ),
    "seed_oss": GgufArchitecture("seed_oss", "SeedOssForCausalLM", "gguf-seed-oss", _rows(_COMMON)),
    "ernie4_5": GgufArchitecture("ernie4_5", "Ernie4_5ForCausalLM", "gguf", _rows(_COMMON)),
}  # fmt: skip


def architecture_of(config: Mapping[str, Any]) -> GgufArchitecture:
    """The architecture for a configuration. `SurgeryError` if it is not known here, or is another model with it."""
    kind = str(config.get("model_type") or "")
    found = _BY_TYPE.get(kind)
    if found is None:
        known = ", ".join(_BY_TYPE)
        raise SurgeryError(
            f"no GGUF file is written for the model type {kind!r}", why=f"they are written for {known}", fix=REMEDY
        )
    classes = config.get("architectures") or [found.model_class]
    if classes != [found.model_class]:
        why = f"llama.cpp computes {found.model_class}, which has no other head"
        raise SurgeryError(f"no GGUF file is written for {', '.join(map(str, classes))}", why=why, fix=REMEDY)
    for name, values in found.unsaid:
        if name in config and config[name] not in values:
            why = f"llama.cpp takes it to be {' or '.join(map(repr, values))}, and its files do not say it"
            raise SurgeryError(f"llama.cpp can't compute {name}={config[name]!r}", why=why, fix=OTHER)
    for name in found.checks:
        if (why := CHECKS[name](config)) is not None:
            raise SurgeryError(f"llama.cpp would compute this {found.model_class} otherwise", why=why, fix=OTHER)
    return found


REMEDY = "merge_to(model, folder) writes a checkpoint, which llama.cpp's convert_hf_to_gguf.py may read"
OTHER = "merge_to(model, folder) writes a checkpoint for other engines"
