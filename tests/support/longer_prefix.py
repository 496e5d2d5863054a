"""Adapters of longer prefixes, moved from their start, for files with slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["longer", "moved"]


def moved(built: tuple[nn.Module, dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model whose weights are large enough for its attention to matter, and a call of five rows."""
    model, inputs = built
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    if hasattr(model, "config"):
        model.config.use_cache = False  # type: ignore[union-attr]
    return model, {name: torch.cat([value, value, value[:1]]) for name, value in inputs.items()}


def longer(inputs: dict[str, Any]) -> dict[str, Any]:
    wide = {name: torch.cat([value, value[:2]]) for name, value in inputs.items()}
    return {name: torch.cat([value, torch.ones_like(value[:, :2])], 1) for name, value in wide.items()}
