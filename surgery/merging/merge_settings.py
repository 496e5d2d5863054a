"""How a merge folds: the arguments of `merge` that every site needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surgery.arithmetic.rounding import HALF, Rounding, RoundingMode, feedback_factor
from surgery.errors import MergeError, qualified_name

__all__ = ["Keep", "MergeSettings", "Quantised"]

Keep = Literal["record", "copy"]
Quantised = Literal["refuse", "dequantise", "requantise"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_DTYPE = 'merge(model, quantised="dequantise", dtype=…)'


@dataclass(frozen=True, eq=False)
class MergeSettings:
    """The settings of one merge.

    Attributes:
        keep: what is kept to unmerge.
        untie: whether a site whose weight another module shares gets a weight of its own.
        rounding: how sums are rounded to half precision.
        generator: draws the numbers of stochastic rounding.
        safe: whether values that are not finite are an error.
        quantised: what happens to a packed weight.
        dtype: the dtype of a plain Linear in the place of a quantised module. None: that of its dequantised weight.
        limit: the share of ‖ΔW‖ that requantising may lose. None: any.
        products: H = XᵀX of the inputs of an example, by the id of the site's module.
    """

    keep: Keep = "record"
    untie: bool = False
    rounding: RoundingMode = "nearest"
    generator: torch.Generator | None = None
    safe: bool = False
    quantised: Quantised = "refuse"
    dtype: torch.dtype | None = None
    limit: float | None = 0.10
    products: Mapping[int, Tensor] = field(default_factory=dict)
    _factors: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rounding not in get_args(RoundingMode):
            names = ", ".join(map(repr, get_args(RoundingMode)))
            raise MergeError(f"rounding={self.rounding!r} is not known", fix=f"use one of {names}")
        if self.quantised not in get_args(Quantised):
            names = ", ".join(map(repr, get_args(Quantised)))
            raise MergeError(f"quantised={self.quantised!r} is not known", fix=f"use one of {names}")
        if self.keep not in get_args(Keep):
            names = ", ".join(map(repr, get_args(Keep)))
            raise MergeError(f"keep={self.keep!r} is not known", fix=f"use one of {names}")
        number = isinstance(self.limit, (int, float)) and not isinstance(self.limit, bool)
        if self.limit is not None and not (number and self.limit >= 0):
            why = "it is the share of ‖ΔW‖ that a site may lose"
            raise MergeError(
                f"limit={self.limit!r} is not a share", why=why, fix="use a number from 0, or None for any share"
            )
        if self.dtype is not None and self.quantised != "dequantise":
            raise MergeError("a dtype is not used", why="only quantised weights change theirs", fix=_DTYPE)
        if self.dtype is not None and self.dtype not in DTYPES:
            names = ", ".join(map(str, DTYPES))
            why = "a plain Linear multiplies with floating-point numbers of at least 16 bits"
            raise MergeError(f"dtype={self.dtype!r} can't be used here", why=why, fix=f"use one of {names}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise MergeError(f"generator={self.generator!r} is not a torch.Generator", fix="pass one, or None")
        if self.generator is not None and self.rounding != "stochastic":
            why = f"rounding={self.rounding!r} does not draw numbers"
            raise MergeError("a generator is not used", why=why, fix='rounding="stochastic"')

    def rounding_of(self, module: nn.Module, base: type[nn.Module], weight: Tensor) -> Rounding | None:
        """How changes of a weight of this module are rounded; None: to the nearest number."""
        if self.rounding == "nearest" or weight.dtype not in HALF:
            return None
        if self.rounding == "stochastic":
            return Rounding("stochastic", self.generator)
        transposed = any(qualified_name(cls) == "transformers.pytorch_utils.Conv1D" for cls in base.__mro__)
        # An embedding returns rows as they are; in other modules a row of the weight gives one output.
        if weight.dim() < 2 or issubclass(base, nn.Embedding):
            return None
        key, products = id(module), self.products.get(id(module))
        if products is None or len(products) != weight.shape[0 if transposed else 1] or weight.dim() > 2:
            return Rounding("error-feedback", transposed=transposed)
        if key not in self._factors:
            self._factors[key] = feedback_factor(products)
        return Rounding("error-feedback", factor=self._factors[key], transposed=transposed)
