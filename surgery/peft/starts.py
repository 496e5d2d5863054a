"""Tensors with which a new adapter of the façade starts, beside the rules' own starts: of a file, or by a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import submodule, unwrap
from surgery.peft.base_config import PeftConfig
from surgery.peft.errors import as_builtin
from surgery.peft_format.key_history import PREFIX
from surgery.peft_format.methods import method_of
from surgery.peft_format.writing import from_peft

__all__ = ["load_start"]


def load_start(model: nn.Module, config: PeftConfig, adapter: str) -> None:
    """Put the tensors that a configuration starts from into a new adapter."""
    tensors = {**method_of(str(config.method)).start_tensors(config.to_dict()), **_masks(model, config, adapter)}
    if tensors:
        surgery.load_adapter_state_dict(model, from_peft(model, adapter, tensors)[0], adapter)


def _masks(model: nn.Module, config: Any, adapter: str) -> dict[str, Tensor]:
    """The places that `ShiraConfig.mask_fn` chooses in each weight, under PEFT's keys."""
    function = vars(config).get("own_mask_fn")
    if function is None:
        return {}
    keywords = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    ends = f"{RESERVED}.index"
    indices = {key: value for key, value in surgery.adapter_state_dict(model, adapter).items() if key.endswith(ends)}
    places: dict[str, Tensor] = {}
    for key, index in indices.items():
        path = key.removesuffix(ends).rstrip(".")
        module: Any = submodule(unwrap(model), path)
        with torch.no_grad():
            mask = function(module, config.r, **keywords)
        shape, count = tuple(module.weight.shape), len(index)
        chosen = torch.stack(torch.where(mask == 1)) if isinstance(mask, Tensor) and mask.shape == shape else None
        if chosen is None or chosen.shape[1] != count:
            got = f"{chosen.shape[1]} ones" if chosen is not None else f"a {type(mask).__name__} of another shape"
            why = f"it gives {got}, and needs {count} ones, r · (out + in), in a mask of {shape}"
            raise as_builtin(SurgeryError("the mask of mask_fn does not fit", where=path, why=why))
        places[f"{PREFIX}{path}.shira_indices" if path else f"{PREFIX}shira_indices"] = chosen.int()
    return places
