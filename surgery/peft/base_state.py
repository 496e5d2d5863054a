"""The base's tensors under their own names: PEFT's functions around a model with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from surgery.errors import SurgeryError
from surgery.patterns.wrappers import unwrap
from surgery.peft.delegation import inside
from surgery.peft.errors import as_builtin, pefts_errors
from surgery.peft.model import LoadResult
from surgery.peft_format.key_history import PREFIX
from surgery.rewritten_model.state_dict import base_state_dict, fill_tensors
from surgery.state.records import merged_adapters

__all__ = ["get_base_model_state_dict", "load_base_tensors", "set_base_model_state_dict"]

_INSIDE = frozenset({"base_layer", "token_adapter", "original_module"})  # where PEFT's layers have the base's tensors


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the base's tensors by their own names, without adapters.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_base_model_state_dict, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> list(get_base_model_state_dict(model))
    ['0.weight', '0.bias']

    Args:
        model: a façade, or a model with adapters.

    Returns:
        Name → tensor, as the model's `state_dict()` before the first adapter; while merged, the merged weights.
    """
    with pefts_errors():
        return base_state_dict(inside(model))


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load tensors of the base, under their own names, into a model with adapters. The adapters stay as they are.

    Args:
        model: a façade, or a model with adapters.
        state_dict: name → tensor.
        strict: whether a missing or an unexpected name is an error; default True.

    Returns:
        The missing and the unexpected names.

    Raises:
        SurgeryError: names are missing or unexpected and `strict`, or adapters are merged. It is also a RuntimeError.
    """
    base = inside(model)
    _require_unmerged(base)
    own = base_state_dict(base)
    missing, unexpected = [name for name in own if name not in state_dict], [n for n in state_dict if n not in own]
    if strict and (missing or unexpected):
        lines = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        lines += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise as_builtin(SurgeryError("Error(s) in loading state_dict", why="; ".join(lines)), RuntimeError)
    wrong = [
        f"size mismatch for {name}: {tuple(state_dict[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    if wrong:
        raise as_builtin(SurgeryError("Error(s) in loading state_dict", why="; ".join(wrong[:5])), RuntimeError)
    base.load_state_dict({name: tensor for name, tensor in state_dict.items() if name in own}, strict=False)
    return LoadResult(missing, unexpected)


def load_base_tensors(model: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Copy what stands under PEFT's keys of the base's own tensors into the base; return these keys.

    PEFT trains biases in the base, so its state dict of an adapter may have them. Tensors of the base that are on the
    device meta are left: a copy would be lost. The caller's journal undoes the copies.
    """
    base = unwrap(inside(model))
    own = {name: tensor for name, tensor in base_state_dict(base).items() if not tensor.is_meta} if tensors else {}
    named = {key: name for key in tensors if (name := _base_name(key)) in own}
    if not named:
        return set()
    _require_unmerged(base)
    for key, name in named.items():
        there, here = tuple(tensors[key].shape), tuple(own[name].shape)
        if there != here:
            what, why = f"{key} does not fit", f"{there} is not the {here} of the base"
            raise as_builtin(SurgeryError(what, why=why), RuntimeError)
    fill_tensors({name: own[name] for name in named.values()}, {name: tensors[key] for key, name in named.items()})
    return set(named)


def _base_name(key: str) -> str:
    """The base's name of a tensor by PEFT's key."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in _INSIDE)


def _require_unmerged(base: Any) -> None:
    if merged := merged_adapters(unwrap(base)):
        what = f"the base's weights can't be loaded while {', '.join(merged)} are merged"
        raise as_builtin(SurgeryError(what, fix="call unmerge_adapter() first"), RuntimeError)
