"""Converts PEFT's LoRA: folds scales into B, and DoRA's magnitudes into gains."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.conversion.converters import converter
from surgery.onnx.runtime.dtypes import widened
from surgery.patterns.paths import pattern_value, select_targets

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["convert_lora"]

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


@converter("LORA")
def convert_lora(conversion: Conversion) -> None:
    """Converts all LoRA tensors of the checkpoint."""
    config = conversion.checkpoint.config
    conversion.problems += conversion.checkpoint.unsupported_fields(*_FIELDS)
    initialization = config.get("init_lora_weights", True)
    if isinstance(initialization, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", initialization):
        why = "it changed the base's weights at the start, and the file has the base's own"
        fix = "save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain LoRA of the adapter"
        conversion.problems.append(
            SurgeryError(f"PEFT's init_lora_weights={initialization!r} can't be converted", why=why, fix=fix)
        )
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key in list(conversion.remaining_tensors):
        hit = _KEY.fullmatch(key)
        if hit:
            name = "B_bias" if hit[3] == "bias" and hit[2] == "B" else _NAMES.get(hit[2], hit[2])
            factors.setdefault(hit[1] or "", {})[name] = widened(conversion.remaining_tensors.pop(key))
            if hit[2].startswith("embedding"):
                conversion.embeddings.add(hit[1] or "")
    for path, tensors in factors.items():
        owner = path.removesuffix(_OUT)
        part = "out_" if owner != path else ""
        with conversion.collecting_errors(path):
            _fill_site(conversion, owner, part, tensors)
    _check_targets(conversion, set(factors))


def _fill_site(conversion: Conversion, path: str, part: str, tensors: dict[str, np.ndarray]) -> None:
    """Fills one site's slots. `part`: prefix of the tensor names for an attention's output map, else empty."""
    if not {"A", "B"} <= tensors.keys():
        raise SurgeryError("the checkpoint has a part of a LoRA", why=f"there is only {', '.join(tensors)}")
    slots = conversion.slots(path, "lora")
    A, B = tensors["A"], tensors["B"]
    scale = _scale(conversion, path, len(A))
    if part:  # PEFT (to 0.21.2) adds the output map's change twice, so the trained change is twice B A
        scale *= 2
    if A.ndim != B.ndim or A.ndim < 2:
        raise SurgeryError("the checkpoint's tensors are not a LoRA's", why=f"A is {A.shape}, B {B.shape}")
    groups = _groups(slots.get(part + "A"), A)
    if groups > 1:
        A, B = _split_groups(conversion, path, A, B, groups)
    slot_tensors = {"A": A, "B": B * B.dtype.type(scale)}
    if "B_bias" in tensors:
        slot_tensors["B_bias"] = tensors["B_bias"] * B.dtype.type(scale)
    if "magnitude" in tensors:
        if part or groups > 1:
            raise SurgeryError("this module's DoRA can't be converted", fix="load_adapter and export_adapter")
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
    """Returns the number of the convolution's groups: PEFT's A reads all channels, the slot's A those of one group."""
    if slot is None or A.ndim < 3 or len(slot.shape) != A.ndim or not slot.shape[1] or A.shape[1] % slot.shape[1]:
        return 1
    return A.shape[1] // slot.shape[1]


def _split_groups(
    conversion: Conversion, path: str, A: np.ndarray, B: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slot's A and B from PEFT's, whose A must be zero for channels of other groups."""
    blocks = A.reshape(groups, len(A) // groups, groups, A.shape[1] // groups, *A.shape[2:])
    diagonal = np.stack([blocks[i, :, i] for i in range(groups)])
    if np.count_nonzero(blocks) > np.count_nonzero(diagonal):
        why = "it reads channels of other groups, and the kernel of a convolution with groups does not"
        raise SurgeryError("PEFT's lora_A can't be converted", why=why)
    rule = conversion.rule_of(path, "lora")
    if rule.get("rank", groups) % groups:  # the slot's B has no groups: a block diagonal of the checkpoint's groups
        out, rank = len(B) // groups, B.shape[1]
        wide = np.zeros((len(B), rank * groups, *B.shape[2:]), B.dtype)
        for i in range(groups):
            wide[i * out : (i + 1) * out, i * rank : (i + 1) * rank] = B[i * out : (i + 1) * out]
        B = wide
    return diagonal.reshape(-1, *diagonal.shape[2:]), B


# DoRA ---------------------------------------------------------------------------------------------------------


def _gain(
    conversion: Conversion, path: str, A: np.ndarray, B: np.ndarray, scale: float, magnitude: np.ndarray
) -> np.ndarray:
    """Returns magnitude / ‖W + s B A‖ for each output feature; 1 where the norm is zero."""
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
    """Whether the output features are the weight's last axis."""
    module = next(iter(conversion.slots(path, "lora").values())).module
    if path in conversion.embeddings or module in _LAST:
        return True
    if module not in _FIRST and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        why = f"the weight of {module} is square, so its axes can be those of a Linear or of a Conv1D"
        raise SurgeryError("this module's DoRA can't be converted", why=why, fix="load_adapter and export_adapter")
    return False


# Missing tensors ---------------------------------------------------------------------------------------------------


def _check_targets(conversion: Conversion, paths: set[str]) -> None:
    """Notes each target of the configuration for which the checkpoint has no tensors: it is incomplete."""
    config = conversion.checkpoint.config
    if config.get("target_modules") == "all-linear":
        return
    sites = [site for site, rule in conversion.manifest.groups if rule == "lora"]
    with conversion.collecting_errors("target_modules"):
        for path in sorted(select_targets(config, sites) - {path.removesuffix(_OUT) for path in paths}):
            why = "the configuration names it among its targets"
            conversion.problems.append(SurgeryError("the checkpoint has no tensors for a target", where=path, why=why))
