"""Values of a GGUF file's header that are computed from a configuration: functions by their names in the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError

__all__ = ["FULL", "VALUES", "check_rope", "head_size", "rope_factors", "rope_kind", "rope_parameters"]

Config = Mapping[str, Any]
FULL, WINDOWS = "full_attention", "sliding_attention"
_SAID = frozenset({"default", "linear", "yarn", "llama3"})  # kinds of rotary embeddings that the header says


def rope_parameters(config: Config, kind: str = FULL) -> Mapping[str, Any]:
    """The parameters of rotary embeddings, of one kind of layers where a model has two."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if FULL in parameters or WINDOWS in parameters:
        return parameters.get(kind) or {}
    own = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**own, **parameters} if kind == FULL else {}


def rope_kind(config: Config) -> str:
    parameters = rope_parameters(config)
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def check_rope(config: Config, factors: bool, fix: str) -> None:
    """Raises for rotary embeddings that a file does not say. `factors`: those of Llama 3 are a tensor of the file."""
    kind = rope_kind(config)
    if kind not in _SAID or kind == "llama3" and not factors:
        known = ", ".join(sorted(_SAID if factors else _SAID - {"llama3"}))
        why = f"the file has fields for {known}"
        raise SurgeryError(f"llama.cpp can't be told the rotary embeddings {kind!r}", why=why, fix=fix)


def rope_factors(config: Config) -> Tensor | None:
    """Llama 3's factor for each frequency, by which llama.cpp divides it; None for other rotary embeddings."""
    if rope_kind(config) != "llama3":
        return None
    given = rope_parameters(config)
    size = head_size(config)
    frequencies = 1.0 / (given.get("rope_theta", 10000.0) ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    context = given["original_max_position_embeddings"]
    factors: list[float] = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < context / high:
            factors.append(1)
        elif length > context / low:
            factors.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(factors, dtype=torch.float32)


def head_size(config: Config) -> int:
    size = config.get("head_dim")
    return int(size) if size is not None else int(config["hidden_size"]) // int(config["num_attention_heads"])


def _width(config: Config) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _rotary_size(config: Config) -> int:
    """How many numbers of a head are turned, where that is a part of them."""
    share = rope_parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return int(share * _width(config))


def _scaling(config: Config) -> Mapping[str, Any]:
    return rope_parameters(config) if rope_kind(config) in ("linear", "yarn") else {}


def _yarn(*names: str) -> Callable[[Config], Any]:
    def value(config: Config) -> Any:
        given = rope_parameters(config) if rope_kind(config) == "yarn" else {}
        return next((given[name] for name in names if given.get(name) is not None), None)

    return value


def _window_pattern(config: Config) -> list[bool] | None:
    kinds = config.get("layer_types")
    return [kind == WINDOWS for kind in kinds] if kinds is not None else None


VALUES: dict[str, Callable[[Config], Any]] = {
    "head_size": head_size,
    "head_size_by_width": _width,
    "rotary_size": _rotary_size,
    "rotary_size_of_cohere": lambda config: int(config.get("rotary_pct", 1.0) * _width(config)),
    "rope_theta": lambda config: rope_parameters(config).get("rope_theta"),
    "rope_theta_of_windows": lambda config: rope_parameters(config, WINDOWS).get("rope_theta"),
    "rope_scaling_type": lambda config: rope_kind(config) if _scaling(config) else None,
    "rope_scaling_factor": lambda config: _scaling(config).get("factor"),
    "yarn_original_context": _yarn("original_max_position_embeddings"),
    "yarn_attention_factor": _yarn("attention_factor", "attn_factor"),
    "yarn_beta_fast": _yarn("beta_fast"),
    "yarn_beta_slow": _yarn("beta_slow"),
    "window_pattern": _window_pattern,
}
