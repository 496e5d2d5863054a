"""The report of a comparison between an exported file and its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import ParityError
from surgery.results import Report, table

__all__ = ["TIE", "Compared", "Decoded", "ParityReport", "parity_error"]

TIE = 1e-3  # two logits nearer than this are a tie, which rounding decides; half precisions have a larger limit


@dataclass(frozen=True)
class Compared:
    """One output of one call: the largest difference, divided by the output's largest number where that is above 1.

    `lost`: the model's own error against float64, if the tolerance is computed from it; `values`: how the call's values
    differ from the example's; `edge`: a difference is a notice and not an error.
    """

    adapter: str
    sizes: str
    optimiser: bool
    output: str
    difference: float
    tolerance: float
    lost: float = 0.0
    values: str = ""
    edge: bool = False

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def ratio(self) -> float:
        """The difference divided by the tolerance. Integers and booleans have the tolerance 0."""
        return self.difference / self.tolerance if self.tolerance else 0.0 if self.ok else float("inf")


@dataclass(frozen=True)
class Decoded:
    """The tokens that model and file decoded for one row of the example.

    `gap`: distance of the model's two best logits at the first difference; `tie`: below this distance it is a tie.
    """

    adapter: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    gap: float = 0.0
    tie: float = TIE

    @property
    def ok(self) -> bool:
        return self.expected == self.found or self.gap < self.tie

    def __str__(self) -> str:
        if self.expected == self.found:
            return f"{self.adapter}: {len(self.expected)} tokens decoded alike"
        verdict = "a tie" if self.ok else f"{self.gap:.1e} apart"
        position = next(i for i, pair in enumerate(zip(self.expected, self.found, strict=True)) if pair[0] != pair[1])
        return (
            f"{self.adapter}: tokens differ from the {position + 1}. on ({verdict}): {self.expected} and {self.found}"
        )


@dataclass
class ParityReport(Report):
    """All comparisons; prints as a table.

    `moved`: how much each adapter changes the outputs; `weights`: the number of tensors in the file that equal the
    model's to the bit; `decoded`: greedy decoding, token by token; `notices`: calls and adapters that could not be
    compared, and edge cases in which file and model differ.
    """

    path: str
    compared: list[Compared] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)
    weights: int = 0

    @property
    def ok(self) -> bool:
        return all(result.ok for result in (*(result for result in self.compared if not result.edge), *self.decoded))

    @property
    def worst(self) -> Compared | None:
        """The comparison with the largest ratio of difference to tolerance."""
        return max(
            (comparison for comparison in self.compared if not comparison.edge),
            key=lambda comparison: comparison.ratio,
            default=None,
        )

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        for name, results in (("compared", self.compared), ("decoded", self.decoded)):
            data[name] = [{**row, "ok": result.ok} for row, result in zip(data[name], results, strict=True)]
        return {**data, "ok": self.ok}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each comparison of an output, with `ok`."""
        return self.to_dict()["compared"]

    def __str__(self) -> str:
        head = ["adapter", "moves", "sizes", "largest difference", "of output", "tolerance", ""]
        rows: list[list[str]] = []
        groups: dict[tuple[str, str], list[Compared]] = {}
        for comparison in self.compared:
            groups.setdefault((comparison.adapter, comparison.values or comparison.sizes), []).append(comparison)
        for (adapter, sizes), comparisons in groups.items():
            most = max(comparisons, key=lambda comparison: (comparison.ratio, comparison.difference))
            moves = f"{self.moved[adapter]:.1e}" if adapter in self.moved else ""
            verdict = "equal" if most.ok else "differs at an edge" if most.edge else "DIFFERS"
            verdict += f" (the model itself loses {most.lost:.1e})" if most.lost else ""
            rows.append(
                [adapter, moves, sizes, f"{most.difference:.1e}", most.output, f"{most.tolerance:.0e}", verdict]
            )
        lines = [table(head, rows)]
        lines += [str(decoding) for decoding in self.decoded]
        return "\n".join([*lines, *(f"note: {notice}" for notice in self.notices)])


def parity_error(report: ParityReport, files: Sequence[str] = ()) -> ParityError:
    """Returns the error for a report. `files`: adapters that were read from files."""
    failed = [decoding for decoding in report.decoded if not decoding.ok]
    worst = report.worst
    if worst is not None and not worst.ok:
        mode = "optimised" if worst.optimiser else "as written"
        fix = "optimize=False tells whether optimisation does it; atol= allows more; verify=False writes it as it is"
        if worst.adapter in files:
            fix = f"check that the adapter's file was made from the model's {worst.adapter!r}"
        error = ParityError(
            "the exported file does not compute what the model does",
            where=f"{worst.output}, adapter {worst.adapter}, {worst.values or worst.sizes}, run {mode}",
            why=f"the largest difference is {worst.difference:.2e}, and {worst.tolerance:.0e} is allowed"
            + (f", {worst.tolerance / worst.lost:.0f} times what the model itself loses" if worst.lost else ""),
            fix=fix,
        )
    else:
        error = ParityError(
            "the exported file decodes other tokens than the model", where=failed[0].adapter, why=str(failed[0])
        )
    error.report = report
    first = report.compared[0].sizes
    error.elsewhere = all(
        comparison.ok or comparison.edge for comparison in report.compared if comparison.sizes == first
    )
    return error
