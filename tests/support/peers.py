"""PEFT and transformers, for tests that compare with them. Tests that import this file skip where one is absent."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

__all__ = ["peft", "transformers"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # old spellings within PEFT
    transformers: Any = pytest.importorskip("transformers")
    peft: Any = pytest.importorskip("peft", reason="compares with PEFT")
