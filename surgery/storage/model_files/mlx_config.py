"""A configuration of transformers with the fields that mlx-lm reads, and how mlx-lm's tensors are called.

mlx-lm has classes of its own for the fields of each model. Those of most models read `rope_theta` and `rope_scaling`,
which transformers 5 writes inside of `rope_parameters`; without them, mlx-lm computes with its own values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.storage.formats.file_tensor import FileTensor

__all__ = ["config_for_mlx", "mlx_row"]

REMEDY = "merge_to(model, folder) writes a checkpoint, which mlx_lm.convert may read"
FULL, WINDOWS = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class MlxRow:
    """What mlx-lm has for a model type: the class of transformers, the activations that it computes, and the fields
    that it takes to have these values."""

    model_class: str
    activations: tuple[str, ...] = ("silu",)
    unsaid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    scalings: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def convert(self, tensors: dict[str, FileTensor], config: Mapping[str, Any]) -> dict[str, FileTensor]:
        return tensors


_WINDOWS_OFF = (("use_sliding_window", (False,)),)
_ROWS: dict[str, MlxRow] = {
    "llama": MlxRow("LlamaForCausalLM"),
    "mistral": MlxRow("MistralForCausalLM"),
    "qwen2": MlxRow("Qwen2ForCausalLM", unsaid=_WINDOWS_OFF),
    "qwen3": MlxRow("Qwen3ForCausalLM", unsaid=(*_WINDOWS_OFF, ("attention_bias", (False,)))),
}


def mlx_row(config: Mapping[str, Any]) -> MlxRow:
    kind = str(config.get("model_type") or "")
    if kind not in _ROWS:
        why = f"they are written for {', '.join(_ROWS)}"
        raise SurgeryError(f"no MLX folder is written for the model type {kind!r}", why=why, fix=REMEDY)
    return _ROWS[kind]


def config_for_mlx(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields, with those of mlx-lm. `SurgeryError` for a model that mlx-lm would compute otherwise."""
    row = mlx_row(config)
    classes = config.get("architectures") or [row.model_class]
    if classes != [row.model_class]:
        why = f"mlx-lm computes {row.model_class}, which has no other head"
        raise SurgeryError(f"no MLX folder is written for {', '.join(map(str, classes))}", why=why)
    for name, values in row.unsaid:
        if name in config and config[name] not in values:
            why = f"it takes it to be {' or '.join(map(repr, values))}"
            raise SurgeryError(f"mlx-lm can't compute {name}={config[name]!r}", why=why)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in row.activations:
        why = f"it computes {' or '.join(row.activations)}"
        raise SurgeryError(f"mlx-lm can't compute the activation {activation!r}", why=why)
    return {**config, **_rope(config, row)}


def _rope(config: Mapping[str, Any], row: MlxRow) -> dict[str, Any]:
    """The fields of rotary embeddings outside of `rope_parameters`."""
    parameters = config.get("rope_parameters") or {}
    full = parameters.get(FULL, parameters)
    fields: dict[str, Any] = {}
    if full.get("rope_theta") is not None:
        fields["rope_theta"] = full["rope_theta"]
    kind = str(full.get("rope_type") or full.get("type") or "default")
    if kind not in row.scalings:
        why = f"it computes {', '.join(row.scalings)} for this model"
        raise SurgeryError(f"mlx-lm can't compute the rotary embeddings {kind!r}", why=why)
    kept = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
    fields["rope_scaling"] = {**kept, "type": kind, "rope_type": kind} if kind != "default" else None
    if full.get("partial_rotary_factor") is not None:
        fields["partial_rotary_factor"] = full["partial_rotary_factor"]
    return fields
