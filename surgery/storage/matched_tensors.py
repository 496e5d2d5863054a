"""Finds the tensors of a plan in an adapter's files, and reports missing, unexpected and misshapen tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.adapter_files.entry import Entry, as_it_is
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.complex_numbers import is_number
from surgery.errors import RuleError, SurgeryError
from surgery.model_edits.structure_tensor import StructureTensor
from surgery.planning.plan import Plan
from surgery.state.restructuring import Restructuring, structure_keys
from surgery.storage.load_report import LoadReport
from surgery.storage.stored_adapter import Stored

__all__ = ["distrusted_rule_error", "locate_structure", "locate_tensors", "misfit_of"]


def locate_structure(
    records: Sequence[Restructuring], stored: Stored, report: LoadReport, finite: bool
) -> list[tuple[StructureTensor, Entry]]:
    """Returns the tensors that structural rules make and that fit the file. Lists others in the report."""
    located: list[tuple[StructureTensor, Entry]] = []
    for key, tensor in structure_keys(records):
        entry = Entry(key)
        if key not in stored.file.shapes:
            report.missing.append(key)
            continue
        misfit = _other_size(stored.file, entry, tensor.shape) or _misfit(stored.file, entry, tensor.dtype, finite)
        if misfit:
            report.misfits.append(f"{key} {misfit}")
        else:
            located.append((tensor, entry))
    return located


def locate_tensors(
    plan: Plan, stored: Stored, report: LoadReport, finite: bool, ignore_sizes: bool = False
) -> list[tuple[PlannedRule, str, Entry]]:
    """Returns the plan's tensors that fit the file, and lists all others in the report.

    `ignore_sizes`: tensors of other sizes are listed as mismatched, and not as misfits.
    """
    used_keys = {key for key, _ in structure_keys(plan.structure)}
    file, located = stored.file, list[tuple[PlannedRule, str, Entry]]()
    shared: dict[Any, Entry] = {}
    for step in plan.steps:
        for spec in step.specs:
            try:
                entry = stored.entry(plan, step, spec.name)
            except Exception as error:  # a file may have any settings
                report.misfits.append(f"{step.path}: {spec.name} has settings that can't be read: {error}"[:400])
                continue
            if entry is None:
                continue
            if entry.key not in file.shapes:
                report.missing.append(entry.key)
                continue
            used_keys.add(entry.key)
            if misfit := _other_size(file, entry, spec.shape):
                (report.mismatched if ignore_sizes else report.misfits).append(f"{entry.key} {misfit}")
                continue
            misfit = _misfit(file, entry, spec.dtype, finite)
            tie = spec.tie(step.rule)
            first = entry if misfit or tie is None else shared.setdefault(tie, entry)
            if first.key != entry.key and not torch.equal(_value(file, first), _value(file, entry)):
                misfit = f"differs from {first.key}, but in this model the two modules share one weight and its change"
            if misfit:
                report.misfits.append(f"{entry.key} {misfit}")
            else:
                located.append((step, spec.name, entry))
    report.missing = list(dict.fromkeys(report.missing))
    report.unexpected = [key for key in file.shapes if key not in used_keys and key not in stored.ignored]
    return located


def _value(file: TensorFile, entry: Entry) -> torch.Tensor:
    return entry.read(file.read(entry.key))


def _other_size(file: TensorFile, entry: Entry, shape: tuple[int, ...]) -> str | None:
    """Returns why a stored tensor's shape does not fit. Computes it on the meta device before numbers are read."""
    file_shape, numbers = file.shapes[entry.key], file.dtypes[entry.key]
    unchanged = entry.read is as_it_is
    try:
        read = (
            file_shape if unchanged else tuple(entry.read(torch.empty(file_shape, dtype=numbers, device="meta")).shape)
        )
    except Exception:  # the rule's reshaping failed for this shape
        read = None
    if read != shape:
        return f"is {file_shape}, which does not give the {shape} of this model"
    return None


def _misfit(file: TensorFile, entry: Entry, dtype: torch.dtype, finite: bool) -> str | None:
    """Returns why the numbers of a stored tensor do not fit a rule."""
    numbers, unchanged = file.dtypes[entry.key], entry.read is as_it_is
    if (numbers.is_floating_point, numbers.is_complex) != (dtype.is_floating_point, dtype.is_complex):
        return f"holds {str(numbers).removeprefix('torch.')}, and {str(dtype).removeprefix('torch.')} is needed"
    try:
        tensor = file.read(entry.key)
        if not unchanged:
            entry.read(tensor)
        checked = finite and is_number(numbers) and not file.sound()
        if checked and not bool(torch.isfinite(tensor if numbers.is_complex else tensor.float()).all()):
            return "holds NaN or infinity"
    except SurgeryError as error:
        return f"can't be converted: {error.why or error.what}"
    except Exception as error:  # the file changed, or contradicts its header
        return f"can't be read: {str(error)[:200]}"
    return None


def misfit_of(file: TensorFile, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype, finite: bool) -> str | None:
    """Returns why a stored tensor does not fit a tensor of this shape and dtype, or None."""
    return _other_size(file, entry, shape) or _misfit(file, entry, dtype, finite)


def distrusted_rule_error(rule: Rule, verb: str = "load_adapter") -> SurgeryError:
    return RuleError(
        f"a {rule.label} is not taken from a file",
        why="its fields name code to import and run",
        fix=f"{verb}(…, trust=True), if you trust the file's author",
    )
