"""The report of a merge: the record's size, and how much of the adapters' change got into the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.arithmetic.corrections import Record
from surgery.errors import SurgeryWarning, abbreviate
from surgery.results import Report
from surgery.state.records import Merged

__all__ = ["MergeLoss", "MergeReport", "TensorLoss", "tensor_losses", "warn_of_losses"]

_HALF = ("float16", "bfloat16")
LIMIT = 0.10  # the share of a change that may be lost without a warning


@dataclass(frozen=True)
class TensorLoss:
    """What one tensor lost of its change ΔW.

    Attributes:
        site: the path of the module.
        tensor: the name of its tensor.
        dtype: the dtype of the tensor, or the layout of a packed weight.
        norm: ‖ΔW‖.
        error: ‖merged − (base + ΔW)‖. None: not known, because the rule computes its value in the tensor's own dtype.
        outputs: for a weight that was quantised anew with `example_inputs`: the lost share of its outputs' change.
    """

    site: str
    tensor: str
    dtype: str
    norm: float | None
    error: float | None
    outputs: float | None = None

    @property
    def share(self) -> float | None:
        """`error` as a share of `norm`; None if it is not known."""
        if self.error is None or self.norm is None or not math.isfinite(self.norm) or not math.isfinite(self.error):
            return None
        return self.error / self.norm if self.norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "share": self.share}


@dataclass(frozen=True)
class MergeLoss(Report):
    """How much of the adapters' change rounding swallowed in a merge.

    Attributes:
        tensors: one `TensorLoss` for each tensor that has a change.
        difference: with `example_inputs`: ‖merged − live‖ / ‖live‖ of the example's outputs.
        kl: with `example_inputs` and outputs that have `logits`: the mean KL divergence of the merged model's
            distributions from the live model's, in nats.
    """

    tensors: tuple[TensorLoss, ...] = ()
    difference: float | None = None
    kl: float | None = None

    @property
    def share(self) -> float:
        """The norm of everything that was lost, as a share of that of all changes; NaN if a change is not finite."""
        if self._not_finite:
            return math.nan
        known = [(loss.norm, loss.error) for loss in self.tensors if loss.share is not None]
        lost = math.hypot(*(error for _, error in known if error is not None))
        return lost / total if (total := math.hypot(*(norm for norm, _ in known if norm is not None))) else 0.0

    @property
    def worst(self) -> TensorLoss | None:
        """The tensor that lost the largest share; None if no share is known."""
        return max((loss for loss in self.tensors if loss.share is not None), key=_share, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "share": self.share}

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each tensor."""
        return [loss.to_dict() for loss in self.tensors]

    @property
    def _not_finite(self) -> list[str]:
        """The tensors whose change, or what was lost of it, is not finite."""
        return [
            f"{loss.site}.{loss.tensor}".lstrip(".")
            for loss in self.tensors
            if not all(norm is None or math.isfinite(norm) for norm in (loss.norm, loss.error))
        ]

    def __str__(self) -> str:
        if self._not_finite:
            return f"the change is not finite at {abbreviate(self._not_finite)}"
        worst = self.worst
        parts = [f"lost {_percent(self.share)} of the change"]
        if worst is not None:
            parts.append(f"at most {_percent(_share(worst))}, at {worst.site or 'the model itself'}")
        if self.difference is not None:
            parts.append(f"outputs differ by {_percent(self.difference)}")
        if self.kl is not None:
            parts.append(f"KL {self.kl:.3g}")
        return "; ".join(parts)


@dataclass(frozen=True)
class MergeReport(Report):
    """The result of a merge.

    Attributes:
        adapters: the names of the merged adapters.
        sites: the number of sites.
        nbytes: the bytes kept so that `unmerge` restores the weights' bits.
        entries: the number of entries of the folded weights.
        loss: how much of the change rounding swallowed, at each tensor and in an example's outputs.
    """

    adapters: tuple[str, ...]
    sites: int
    nbytes: int
    entries: int
    loss: MergeLoss = field(default_factory=MergeLoss)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row; `adapters` is a text, and `loss` the share. `report.loss.to_rows()` has a row for each tensor."""
        return [{**self.to_dict(), "adapters": ", ".join(self.adapters), "loss": self.loss.share}]

    def __str__(self) -> str:
        per_entry = f", {self.nbytes / self.entries:.3f} bytes an entry" if self.entries else ""
        kept_bytes = f"keeps {self.nbytes:,} bytes to unmerge{per_entry}"
        return f"merged {', '.join(self.adapters)} at {self.sites} sites; {kept_bytes}"


def tensor_losses(site: str, merged: Merged) -> list[TensorLoss]:
    """The loss of each tensor at a site. The norms of several folds of one tensor are added as squares."""
    by_name: dict[str, list[Record]] = {}
    for name, record in merged.folds:
        by_name.setdefault(name, []).append(record)
    losses = []
    for name, records in by_name.items():
        norms, errors = [record.norm for record in records], [record.error for record in records]
        dtype = str(records[0].dtype).removeprefix("torch.")
        losses.append(TensorLoss(site, name, dtype, _together(norms), _together(errors)))
    if (packed := merged.packed) is not None:
        losses[:0] = [TensorLoss(site, name, packed.layout, *loss) for name, loss in packed.losses.items()]
    return losses


def warn_of_losses(loss: MergeLoss, stacklevel: int) -> None:
    """Warn where more than 10 % of a change was lost."""
    # A weight that is quantised anew has a limit of its own. Wider dtypes lose only what is zero to within rounding.
    heavy = [tensor for tensor in loss.tensors if (tensor.share or 0.0) > LIMIT and tensor.dtype in _HALF]
    if not heavy:
        return
    worst = max(heavy, key=_share)
    where = abbreviate(f"{tensor.site}.{tensor.tensor}".lstrip(".") for tensor in heavy)
    dtypes = " and ".join(dict.fromkeys(tensor.dtype for tensor in heavy))
    warnings.warn(
        f"{dtypes} swallowed more than 10 % of the change that was merged at {where} (at most "
        f"{_percent(_share(worst))}). Merge in a wider dtype, with rounding='error-feedback' or 'stochastic', or keep "
        "the adapter unmerged",
        SurgeryWarning,
        stacklevel=stacklevel + 1,
    )


def _together(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def _share(loss: TensorLoss) -> float:
    return loss.share or 0.0


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
