"""An exported file beside the live model: every adapter, several sizes, with the runtime's optimiser and without."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.activation import activate, active, deactivate
from surgery.errors import ParityError
from surgery.merging import unmerge
from surgery.onnx.carried import slot_arrays
from surgery.onnx.copies import sharing_copy
from surgery.onnx.decoding import Decoded, decode
from surgery.onnx.given import Given, arrays_of, outputs_of
from surgery.onnx.sizes import other_sizes
from surgery.state import adapter_names, model_state, require_state
from surgery.table import table

__all__ = ["ParityReport", "TOLERANCES", "verify_onnx"]

# What rounding in another order comes to, of the largest number of an output: some hundred roundings of float32 in a
# deep model, some tens of the half precisions, whose kernels round between operations that others fuse.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-4}
TOKENS = 8


@dataclass(frozen=True)
class Compared:
    """One output of one call: the largest difference, divided by the output's largest number where that is above 1."""

    adapter: str
    sizes: str
    optimiser: bool
    output: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


@dataclass
class ParityReport:
    """All that was compared; prints as a table.

    `decoded`: greedy decoding, token for token; `notices`: what could not be compared.
    """

    path: str
    compared: list[Compared] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(one.ok for one in (*self.compared, *self.decoded))

    @property
    def worst(self) -> Compared | None:
        """The comparison that is nearest to its tolerance, or farthest above."""
        return max(self.compared, key=lambda one: _order(one.difference / one.tolerance), default=None)

    def to_json(self) -> str:
        data = {"path": self.path, "ok": self.ok, "notices": self.notices}
        data["compared"] = [{**asdict(one), "ok": one.ok} for one in self.compared]
        data["decoded"] = [{**asdict(one), "ok": one.ok} for one in self.decoded]
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        head = ["adapter", "sizes", "largest difference", "of output", "tolerance", ""]
        rows: list[list[str]] = []
        groups: dict[tuple[str, str], list[Compared]] = {}
        for one in self.compared:
            groups.setdefault((one.adapter, one.sizes), []).append(one)
        for (adapter, sizes), found in groups.items():
            most = max(found, key=lambda one: _order(one.difference))
            told = "equal" if most.ok else "DIFFERS"
            rows.append([adapter, sizes, f"{most.difference:.1e}", most.output, f"{most.tolerance:.0e}", told])
        lines = [table(head, rows)]
        lines += [str(one) for one in self.decoded]
        return "\n".join([*lines, *(f"not compared: {one}" for one in self.notices)])


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any,
    adapters: str | Sequence[str] | None = None,
    *,
    atol: float | None = None,
    providers: Sequence[str] | None = None,
) -> ParityReport:
    """Compare an exported file with the live model it was made of.

    To be written.
    """
    from surgery.onnx.manifest import read_manifest

    manifest = read_manifest(path)
    given = Given.of(model, example_inputs)
    report = ParityReport(str(path))
    _check_file(path, manifest)
    sessions = {level: _session(path, level, providers) for level in (True, False)}
    calls = list(other_sizes(given, manifest.inputs, manifest.free))
    for name, reference, fed in _references(model, manifest, adapters, report):
        for group in calls:
            sizes, call = group[0]
            for sizes, call in group:  # noqa: B007
                expected = _expected(reference, call)
                if expected is not None:
                    break
            else:
                report.notices.append(f"{name} at {group[0][0]}: the model itself can't be called so")
                continue
            for level, session in sessions.items():
                found = session.run(None, {**arrays_of(call, manifest.inputs), **fed})
                report.compared += _compared(name, sizes, level, manifest.outputs, expected, found, atol)
        decoded = decode(reference, given, path, manifest, name, fed, TOKENS)
        report.decoded += [decoded] if decoded is not None else []
    if not report.ok:
        raise _error(report)
    return report


def _references(
    model: nn.Module, manifest: Any, adapters: Any, report: ParityReport
) -> Iterator[tuple[str, nn.Module, dict[str, np.ndarray]]]:
    """What the file has to compute: a name, the model that computes it, and what is fed into the slots."""
    state = model_state(model)
    if state is None:
        yield "base", sharing_copy(model), {}
        return
    copy = sharing_copy(model)
    unmerge(copy)
    if manifest.adapters != "slots":
        wanted = adapter_names(state, adapters) if adapters is not None else list(active(copy))
        activate(copy, wanted)
        yield " + ".join(wanted) or "base", copy, {}
        return
    constants = list(manifest.constants)
    names = adapter_names(require_state(copy), adapters)
    if constants:
        report.notices.append(f"the file without an adapter: it holds what has no slot of {', '.join(constants)}")
    else:
        deactivate(copy)
        yield "base", copy, {}
    for name in names:
        if constants and constants != [name]:
            report.notices.append(f"{name}: the file holds what has no slot of {', '.join(constants)}")
            continue
        activate(copy, name)
        yield name, copy, slot_arrays(copy, name, manifest)


def _expected(reference: nn.Module, call: Given) -> list[Tensor] | None:
    with torch.no_grad():
        try:
            return outputs_of(call.call(reference, call.copy()))
        except Exception:  # such as positions past the last one
            return None


def _compared(
    name: str,
    sizes: str,
    level: bool,
    outputs: Sequence[str],
    expected: list[Tensor],
    found: list[Any],
    atol: float | None,
) -> list[Compared]:
    if len(expected) != len(found):
        raise ParityError(f"the file has {len(found)} outputs, and the model {len(expected)}", where=name)
    made = []
    for output, want, have in zip(outputs, expected, found, strict=True):
        tolerance = atol if atol is not None else TOLERANCES.get(str(want.dtype).removeprefix("torch."), 0.0)
        made.append(Compared(name, sizes, level, output, difference(want, have), tolerance))
    return made


def difference(want: Tensor, have: Any) -> float:
    """The largest difference, of the largest number where that is above 1; infinite where shapes or NaNs differ."""
    expected, found = want.detach().cpu().double().numpy(), np.asarray(have).astype(np.float64)
    if expected.shape != found.shape or not np.array_equal(np.isnan(expected), np.isnan(found)):
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite & ~np.isnan(expected)], found[~finite & ~np.isnan(found)]):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(expected - found)[finite].max() / max(1.0, np.abs(expected[finite]).max()))


def _check_file(path: str | Path, manifest: Any) -> None:
    """The graph by onnx's own checker, and whether all slots are there."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ParityError("onnx.checker refuses the file", where=str(path), why=str(error)[:400]) from error


def _session(path: str | Path, optimised: bool, providers: Sequence[str] | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each slot that it is no constant
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, list(providers or ["CPUExecutionProvider"]))
    except Exception as error:
        raise ParityError("onnxruntime can't open the file", where=str(path), why=str(error)[:400]) from error


def _error(report: ParityReport) -> ParityError:
    failed = [one for one in report.decoded if not one.ok]
    worst = report.worst
    if worst is not None and not worst.ok:
        mode = "optimised" if worst.optimiser else "as written"
        error = ParityError(
            "the exported file does not compute what the model does",
            where=f"{worst.output}, adapter {worst.adapter}, {worst.sizes}, run {mode}",
            why=f"the largest difference is {worst.difference:.2e}, and {worst.tolerance:.0e} is allowed",
            fix="optimize=False tells whether optimisation does it; atol= allows more; verify=False writes it as it is",
        )
    else:
        error = ParityError(
            "the exported file decodes other tokens than the model", where=failed[0].adapter, why=str(failed[0])
        )
    error.report = report
    return error


def _order(ratio: float) -> float:
    return float("inf") if ratio != ratio else ratio
