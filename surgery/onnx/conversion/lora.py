"""PEFT's LoRA as the tensors of slots: scales in B, DoRA's magnitudes as gains."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.runtime.dtypes import widened
from surgery.patterns.paths import pattern_value, select_targets

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["lora"]

_FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "lora_dropout",
    "init_lora_weights",
)  # fmt: skip
_KEY = re.compile(r"(?:(.*)\.)?lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(weight|bias))?")
_OUT = ".base_layer.out_proj"  # of an nn.MultiheadAttention
_NAMES = {"embedding_A": "A", "embedding_B": "B", "magnitude_vector": "magnitude"}
# Modules whose weight has its outputs first, and those that have them last.
_FIRST = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d")
_LAST = ("Conv1D", "Embedding")


def lora(conversion: Conversion) -> None:
    """All of the checkpoint's LoRA tensors; problems are noted."""
    config = conversion.checkpoint.config
    conversion.problems += conversion.checkpoint.unsaid(*_FIELDS)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", start):
        why = "it changed the base's weights at the start, and the file has the base's own"
        fix = "save_pretrained(…, path_initial_model_for_weight_conversion=…) makes it a plain LoRA"
        conversion.problems.append(
            SurgeryError(f"PEFT's init_lora_weights={start!r} can't be converted", why=why, fix=fix)
        )
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key in list(conversion.left):
        hit = _KEY.fullmatch(key)
        if hit:
            name = "B_bias" if hit[3] == "bias" and hit[2] == "B" else _NAMES.get(hit[2], hit[2])
            factors.setdefault(hit[1] or "", {})[name] = widened(conversion.left.pop(key))
            if hit[2].startswith("embedding"):
                conversion.embeddings.add(hit[1] or "")
    for path, tensors in factors.items():
        owner = path.removesuffix(_OUT)
        part = "out_" if owner != path else ""
        with conversion.noting(path):
            _place(conversion, owner, part, tensors)
    _check_targets(conversion, set(factors))


def _place(conversion: Conversion, path: str, part: str, tensors: dict[str, np.ndarray]) -> None:
    if not {"A", "B"} <= tensors.keys():
        raise SurgeryError("the checkpoint has a part of a LoRA", why=f"there is only {', '.join(tensors)}")
    slots = conversion.slots(path, "lora")
    A, B = tensors["A"], tensors["B"]
    scale = _scale(conversion, path, len(A))
    if part:  # PEFT (to 0.21.2) adds the change of the output map twice: what it trained is twice the file's B
        scale *= 2
    if A.ndim != B.ndim or A.ndim < 2:
        raise SurgeryError("the checkpoint has no LoRA here", why=f"A is {A.shape}, B {B.shape}")
    groups = _groups(slots.get(part + "A"), A)
    if groups > 1:
        A, B = _grouped(conversion, path, A, B, groups)
    slot_tensors = {"A": A, "B": B * B.dtype.type(scale)}
    if "B_bias" in tensors:
        slot_tensors["B_bias"] = tensors["B_bias"] * B.dtype.type(scale)
    if "magnitude" in tensors:
        if part or groups > 1:
            raise SurgeryError("DoRA here can't be converted", fix="load_adapter and export_adapter")
        slot_tensors["gain"] = _gain(conversion, path, A, B, scale, tensors["magnitude"].reshape(-1))
    conversion.add(path, "lora", {part + name: array for name, array in slot_tensors.items()})


def _scale(conversion: Conversion, path: str, rank: int) -> float:
    checkpoint = conversion.checkpoint
    config_rank = pattern_value(checkpoint.patterns("rank_pattern"), path, checkpoint.number("r", 8))
    if config_rank != rank:
        raise SurgeryError(
            "the tensors have another rank than the configuration says", why=f"{rank}, and not {config_rank}"
        )
    alpha = pattern_value(checkpoint.patterns("alpha_pattern"), path, checkpoint.number("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if checkpoint.flag("use_rslora") else rank)


# Convolutions with groups -------------------------------------------------------------------------------------


def _groups(slot: Any, A: np.ndarray) -> int:
    """How many groups the slot's convolution has: PEFT's A looks at all channels, and the slot's at a group's."""
    if slot is None or A.ndim < 3 or len(slot.shape) != A.ndim or not slot.shape[1] or A.shape[1] % slot.shape[1]:
        return 1
    return A.shape[1] // slot.shape[1]


def _grouped(
    conversion: Conversion, path: str, A: np.ndarray, B: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    blocks = A.reshape(groups, len(A) // groups, groups, A.shape[1] // groups, *A.shape[2:])
    own = np.stack([blocks[i, :, i] for i in range(groups)])
    if np.count_nonzero(blocks) > np.count_nonzero(own):
        why = "it looks at all channels of a convolution with groups: no kernel with groups does that"
        raise SurgeryError("PEFT's lora_A can't be converted", why=why)
    rule = conversion.rule_of(path, "lora")
    if rule.get("rank", groups) % groups:  # the slot's B has no groups: those of the file's are put side by side
        out, rank = len(B) // groups, B.shape[1]
        wide = np.zeros((len(B), rank * groups, *B.shape[2:]), B.dtype)
        for i in range(groups):
            wide[i * out : (i + 1) * out, i * rank : (i + 1) * rank] = B[i * out : (i + 1) * out]
        B = wide
    return own.reshape(-1, *own.shape[2:]), B


# DoRA ---------------------------------------------------------------------------------------------------------


def _gain(
    conversion: Conversion, path: str, A: np.ndarray, B: np.ndarray, scale: float, magnitude: np.ndarray
) -> np.ndarray:
    """magnitude / ‖W + s B A‖ of each output feature; 1 where the weight is all zero and has no direction."""
    weight = conversion.weights[f"{path}.weight" if path else "weight"]
    last = _outputs_last(conversion, path, weight)
    delta = scale * (B.reshape(len(B), -1).astype(np.float64) @ A.reshape(len(A), -1).astype(np.float64))
    delta = delta.T if last else delta.reshape(len(B), *A.shape[1:])
    if delta.shape != weight.shape or len(magnitude) != len(B):
        raise SurgeryError("DoRA's tensors don't fit the weight", why=f"{delta.shape}, and {weight.shape} in the file")
    axes = 0 if last else tuple(range(1, weight.ndim))
    norm = np.sqrt(np.square(weight + delta).sum(axis=axes))
    return np.where(norm == 0, 1.0, magnitude / np.where(norm == 0, 1.0, norm))


def _outputs_last(conversion: Conversion, path: str, weight: np.ndarray) -> bool:
    module = next(iter(conversion.slots(path, "lora").values())).module
    if path in conversion.embeddings or module in _LAST:
        return True
    if module not in _FIRST and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        why = f"whether a {module}'s weight lies as a Linear's or as a Conv1D's can't be told"
        raise SurgeryError("DoRA here can't be converted", why=why, fix="load_adapter and export_adapter")
    return False


# What lacks ---------------------------------------------------------------------------------------------------


def _check_targets(conversion: Conversion, paths: set[str]) -> None:
    """Sites that the configuration names and the file has nothing for: it is not whole."""
    config = conversion.checkpoint.config
    if config.get("target_modules") == "all-linear":
        return
    sites = [site for site, rule in conversion.manifest.groups if rule == "lora"]
    with conversion.noting("target_modules"):
        for path in sorted(select_targets(config, sites) - {path.removesuffix(_OUT) for path in paths}):
            why = "the configuration names it among its targets"
            conversion.problems.append(SurgeryError("the checkpoint has no tensors for a target", where=path, why=why))
