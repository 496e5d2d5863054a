"""The result of a conversion to LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from surgery.results import Displayed, Report, Table

__all__ = ["LoraReport", "LoraSite"]

_ROUNDING = 1e-5  # a smaller share is not told
_MOST = 10  # sites that a printed report lists, those with the largest errors first


@dataclass(frozen=True)
class LoraSite(Report):
    """One weight that a LoRA changes.

    Attributes:
        path: the module's path.
        weight: the weight's name in the module.
        rank: the rank there.
        norm: the Frobenius norm of the change ΔW.
        error: the share of this norm that the LoRA lacks: ‖ΔW − B A‖ / ‖ΔW‖.
        exact: whether the factors were known, so nothing was decomposed.
    """

    path: str
    weight: str
    rank: int
    norm: float
    error: float
    exact: bool = False


@dataclass(frozen=True)
class LoraReport(Displayed, Report):
    """The result of `as_lora` and `extract_lora`.

    Attributes:
        adapters: the names of the adapters that were converted; empty for `extract_lora`.
        sites: a `LoraSite` for each changed weight.
        error: the share of all changes together that the LoRA lacks.
        trained: the tensors that the new adapter holds in full, by name: norms, biases, embeddings, heads.
        left_out: the changed tensors that the new adapter does not hold, by name.
        outputs: the relative difference of the outputs on each example, as a share of what the adapters change there:
            ‖y_new − y_old‖ / ‖y_old − y_base‖. Empty without examples.
    """

    adapters: tuple[str, ...]
    sites: tuple[LoraSite, ...]
    error: float
    trained: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    outputs: tuple[float, ...] = field(default=())

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each weight."""
        return [site.to_dict() for site in self.sites]

    __repr__ = Displayed.__str__  # instead of the dataclass's

    def _display_parts(self) -> list[str | Table]:
        ranks = sorted({site.rank for site in self.sites})
        text = "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lost = f"{self.error:.2%} of the change is lost" if self.error > _ROUNDING else "only rounding is lost"
        head = f"LoRA at {len(self.sites):,} weights, rank {text}; {lost}"
        parts: list[str | Table] = [head]
        for label, names in (("in full", self.trained), ("left out", self.left_out)):
            if names:
                parts.append(f"{label}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({len(names):,})")
        if self.outputs:
            parts.append("of the outputs' change, the examples lose " + ", ".join(f"{e:.2%}" for e in self.outputs))
        worst = sorted(self.sites, key=lambda site: -site.error)[:_MOST]
        if any(site.error > _ROUNDING for site in worst):
            rows = [[f"{s.path}.{s.weight}".strip("."), s.rank, f"{s.norm:.4g}", f"{s.error:.2%}"] for s in worst]
            parts.append(Table(("weight", "rank", "norm of ΔW", "lost"), [[str(c) for c in row] for row in rows]))
            if len(self.sites) > len(worst):
                parts.append(f"and {len(self.sites) - len(worst):,} more weights, which lose less")
        return parts
