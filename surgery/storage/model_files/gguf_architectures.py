"""What llama.cpp's files say of a model, by its architecture: fields of the header, and how tensors differ.

Source: llama.cpp, conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["FieldRow", "GgufArchitecture", "architecture_of"]


@dataclass(frozen=True)
class FieldRow:
    """A field of the header: its key after the architecture's name, its type, and where its value comes from.

    `source`: names in the configuration, of which the first that it has counts; a name that begins with "=" is a
    function in `gguf_values.py`.
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
_COMMON = _SIZES + """
    attention.layer_norm_rms_epsilon float32 rms_norm_eps
    attention.layer_norm_epsilon     float32 layer_norm_eps layer_norm_epsilon norm_epsilon
    attention.key_length             uint32  head_dim
    attention.value_length           uint32  head_dim
    rope.freq_base                   float32 =rope_theta
    rope.freq_base_swa               float32 =rope_theta_of_windows
    rope.scaling.type                string  =rope_scaling_type
    rope.scaling.factor              float32 =rope_scaling_factor
    rope.scaling.original_context_length uint32  =yarn_original_context
    rope.scaling.yarn_attn_factor    float32 =yarn_attention_factor
    rope.scaling.yarn_beta_fast      float32 =yarn_beta_fast
    rope.scaling.yarn_beta_slow      float32 =yarn_beta_slow
"""  # fmt: skip
_HEADS = """
    vocab_size           uint32 vocab_size
    rope.dimension_count uint32 =head_size
"""
_GEMMA = _SIZES + """
    attention.layer_norm_rms_epsilon float32 rms_norm_eps
    attention.key_length             uint32  head_dim
    attention.value_length           uint32  head_dim
"""  # fmt: skip
_WINDOWS = """
    attention.sliding_window         uint32 sliding_window
    attention.sliding_window_pattern bools  =window_pattern
"""


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    `names`: the `ModuleNames` of its tensors. `activations`: those of transformers that llama.cpp computes for it.
    `shifted_norms`: the names of norms whose weights are stored with 1 added. `unsaid`: fields of the configuration
    with the values that llama.cpp takes them to have; it can't compute other ones. `dropped`: endings of tensors that
    llama.cpp does not have; they have to be zeros.
    """

    name: str
    model_class: str
    names: str
    fields: tuple[FieldRow, ...]
    activations: tuple[str, ...] = ("silu",)
    shifted_norms: str = ""
    unsaid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    dropped: tuple[str, ...] = ()
    rope_factors: bool = False
    windows: bool = False


def _unsaid(**values: tuple[Any, ...]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple(values.items())


_LLAMA = _rows(_COMMON + _HEADS)
_NORM = r".*norm\.weight"
_BY_TYPE: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", "gguf-llama", _LLAMA, rope_factors=True),
    "mistral": GgufArchitecture("llama", "MistralForCausalLM", "gguf-llama", _LLAMA, rope_factors=True),
    "qwen2": GgufArchitecture(
        "qwen2", "Qwen2ForCausalLM", "gguf", _rows(_COMMON), unsaid=_unsaid(use_sliding_window=(False,))
    ),
    "qwen3": GgufArchitecture(
        "qwen3", "Qwen3ForCausalLM", "gguf", _rows(_COMMON), unsaid=_unsaid(use_sliding_window=(False,))
    ),
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
    return found


REMEDY = "merge_to(model, folder) writes a checkpoint, which llama.cpp's convert_hf_to_gguf.py may read"
OTHER = "merge_to(model, folder) writes a checkpoint for other engines"
