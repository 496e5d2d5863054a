"""What llama.cpp computes in one way for an architecture, whatever a file says: functions by their names in the table.

Each gives the reason why a configuration is another one, or None. Source: llama.cpp, src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.storage.model_files.gguf_values import FULL, head_size, rope_kind, rope_parameters

__all__ = ["CHECKS"]

Config = Mapping[str, Any]


def _head_size(config: Config) -> str | None:
    width = int(config["hidden_size"]) // int(config["num_attention_heads"])
    size = head_size(config)
    return f"its heads have {width} numbers, and head_dim is {size}" if size != width else None


def _default_rope(config: Config) -> str | None:
    theta = rope_parameters(config).get("rope_theta", 10000.0)
    if theta != 10000.0:
        return f"its rope_theta is 10000, and that of the model {theta}"
    return _unscaled_rope(config)


def _unscaled_rope(config: Config) -> str | None:
    kind = rope_kind(config)
    return f"its rotary embeddings are not scaled, and those of the model are: {kind!r}" if kind != "default" else None


def _scale_by_head_size(config: Config) -> str | None:
    """Its largest models have a scale of their own, which it knows by their number of layers."""
    large = {46: "gemma2", 62: "gemma3_text"}.get(int(config["num_hidden_layers"])) == config.get("model_type")
    size = int(config["hidden_size"]) // int(config["num_attention_heads"]) if large else head_size(config)
    scalar = config.get("query_pre_attn_scalar", size)
    return f"it scales queries for {size} numbers, and query_pre_attn_scalar is {scalar}" if scalar != size else None


def _rope_of_smollm3(config: Config) -> str | None:
    layers = range(int(config["num_hidden_layers"]))
    given = config.get("no_rope_layers")
    if given is not None and [bool(each) for each in given] != [(layer + 1) % 4 != 0 for layer in layers]:
        return "every fourth of its layers has no rotary embeddings, and no_rope_layers says others"
    return None


def _full_every(step: int) -> Callable[[Config], str | None]:
    def check(config: Config) -> str | None:
        kinds = config.get("layer_types")
        expected = [(layer + 1) % step == 0 for layer in range(int(config["num_hidden_layers"]))]
        if kinds is not None and [kind == FULL for kind in kinds] != expected:
            return f"one of {step} of its layers has attention in full, and layer_types says others"
        return None

    return check


CHECKS: dict[str, Callable[[Config], str | None]] = {
    "head_size": _head_size,
    "default_rope": _default_rope,
    "unscaled_rope": _unscaled_rope,
    "scale_by_head_size": _scale_by_head_size,
    "every_fourth_layer_without_rope": _rope_of_smollm3,
    "every_second_layer_in_full": _full_every(2),
    "every_fourth_layer_in_full": _full_every(4),
    "every_sixth_layer_in_full": _full_every(6),
}
