"""Inverses and orthonormal vectors. An exported graph gets operations of ONNX, which does not have solve or QR."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["cayley", "in_single", "orthonormal_columns", "orthonormal_rows", "upper_inverse"]

F = TypeVar("F", bound=Callable[..., Tensor])


def in_single(function: F) -> F:
    """Runs a function in float32 for half precision, for which LAPACK and Fourier transforms have no kernels."""

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Tensor:
        last = tensors[-1].dtype
        if last in (torch.float16, torch.bfloat16):
            return function(*[tensor.float() for tensor in tensors]).to(last)
        return function(*tensors)

    return run  # type: ignore[return-value]


@in_single
def cayley(Q: Tensor) -> Tensor:
    """Returns the rotations (I - Q) (I + Q)⁻¹ of skew-symmetric matrices (…, n, n)."""
    eye = torch.diag_embed(torch.ones_like(Q[..., 0]))
    if not torch.compiler.is_exporting():
        return torch.linalg.solve(eye + Q, eye - Q, left=False)
    # Gauss-Jordan elimination, one column at a time, without pivoting: xᵀ (I + Q) x is xᵀ x, so the rest of the
    # matrix has a diagonal of at least 1 in each step.
    inverse, left = eye, eye + Q
    for k in range(Q.shape[-1]):
        pivot = left[..., k : k + 1, k : k + 1]
        factor = left[..., :, k : k + 1] - eye[..., :, k : k + 1]
        row, other = left[..., k : k + 1, :] / pivot, inverse[..., k : k + 1, :] / pivot
        left, inverse = left - factor * row, inverse - factor * other
    return (eye - Q) @ inverse


@in_single
def upper_inverse(U: Tensor) -> Tensor:
    """Returns the inverse of an upper triangular matrix."""
    eye = torch.diag_embed(torch.ones_like(U[0]))
    if not torch.compiler.is_exporting():
        return torch.linalg.solve_triangular(U, eye, upper=True)
    rows: list[Tensor] = []  # from the last
    for k in reversed(range(len(U))):
        row = eye[k : k + 1]
        if rows:
            row = row - U[k : k + 1, k + 1 :] @ torch.cat(rows[::-1])
        rows.append(row / U[k : k + 1, k : k + 1])
    return torch.cat(rows[::-1])


@in_single
def orthonormal_columns(u: Tensor) -> Tensor:
    """Orthonormalises columns by Gram-Schmidt. Outside of an export the signs of the vectors are not defined."""
    return orthonormal_rows(u.t()).t() if torch.compiler.is_exporting() else torch.linalg.qr(u)[0]


def orthonormal_rows(raw: Tensor) -> Tensor:
    """Orthonormalises rows by Gram-Schmidt, twice against rounding. Orthonormal rows do not change.

    A QR decomposition gives the same, but ONNX does not have it.
    """
    rows: list[Tensor] = []
    for row in raw.unbind(0):
        for _ in range(2 if rows else 0):
            others = torch.stack(rows)
            row = row - (others @ row) @ others
        rows.append(row / row.square().sum().sqrt())
    return torch.stack(rows)
