"""Prepares a quantised model for training, as PEFT does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["prepare_model_for_kbit_training"]

_KEEP_HALF = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # methods whose models PEFT leaves in half precision


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantised model, convert half-precision parameters to float32, and turn gradient checkpointing on.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.peft import prepare_model_for_kbit_training
    >>> model = prepare_model_for_kbit_training(nn.Sequential(nn.Linear(4, 4).bfloat16()), False)
    >>> model[0].weight.dtype, model[0].weight.requires_grad
    (torch.float32, False)

    Args:
        model: the model. Only models of transformers have gradient checkpointing.
        use_gradient_checkpointing: default True.
        gradient_checkpointing_kwargs: transformers'; default {"use_reentrant": True}.
        auto_clear_cache: whether to give the memory of converted parameters back to the accelerator; default True.

    Returns:
        The same model. Adding an adapter later makes the input require gradients.
    """
    kept = _method(model) in _KEEP_HALF
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if type(parameter) is nn.Parameter and parameter.dtype in (torch.float16, torch.bfloat16) and not kept:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    settings = gradient_checkpointing_kwargs or {"use_reentrant": True}
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # transformers' of today, of old
        if use_gradient_checkpointing and hasattr(model, name):
            getattr(model, name)(settings)
            break
    return model


def _method(model: Any) -> str:
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method))
