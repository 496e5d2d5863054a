"""Greedy decoding, token for token: the live model reads the whole text anew for each, the file goes on from its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.onnx.given import Given

__all__ = ["Decoded", "decode"]

TIE = 1e-3  # two logits nearer than this are a tie, which rounding decides


@dataclass(frozen=True)
class Decoded:
    """What both decoded for one row of the example, and where they part; `gap`: how near the model's two best were."""

    adapter: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    gap: float = 0.0

    @property
    def ok(self) -> bool:
        return self.expected == self.found or self.gap < TIE

    def __str__(self) -> str:
        if self.expected == self.found:
            return f"{self.adapter}: {len(self.expected)} tokens decoded alike"
        told = "a tie" if self.ok else f"{self.gap:.1e} apart"
        at = next(i for i, pair in enumerate(zip(self.expected, self.found, strict=True)) if pair[0] != pair[1])
        return f"{self.adapter}: tokens differ from the {at + 1}. on ({told}): {self.expected} and {self.found}"
