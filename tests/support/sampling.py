"""Selects the cases that `make test` runs; all with ALL_REWRITES=1 (`make rewrites`) or ALL_ONNX=1 (`make onnx`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["LAYERS", "onnx_cases", "sample"]

T = TypeVar("T")
ALL_ONNX = bool(os.environ.get("ALL_ONNX"))
LAYERS = 2 if ALL_ONNX else 1  # of a tiny model that is exported: a second layer takes as long again


def sample(cases: Iterable[T], every: int) -> list[T]:
    """Every n-th case, beginning with the first; all cases if the whole grid is requested."""
    all_cases = list(cases)
    return all_cases if os.environ.get("ALL_REWRITES") else all_cases[::every]


def onnx_cases(cases: Iterable[T], *left: T) -> list[T]:
    """The cases of a test that exports a model, without those `left` to `make onnx`."""
    all_cases = list(cases)
    assert set(left) < set(all_cases), left
    return all_cases if ALL_ONNX else [case for case in all_cases if case not in left]
