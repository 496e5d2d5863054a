"""`Equivalence`: how equal the results of a rewritten module must be to those of its own forward."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Equivalence"]


class Equivalence(NamedTuple):
    """The demand of a rule that computes the same in another way. `apply_rules` compares on the example.

    Attributes:
        exact: Whether outputs and gradients must have the same bits.
        tolerance: The largest difference, relative to the largest value of a tensor. None: computed from the dtype.
        omits: Whether a tensor of the module's output may become None.
    """

    exact: bool = False
    tolerance: float | None = None
    omits: bool = False
