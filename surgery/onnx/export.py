"""Rewritten models as ONNX: adapters folded in, as constants, or as slots that one file has for many of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.onnx.caching import with_cache
from surgery.onnx.copies import sharing_copy, traced_path
from surgery.onnx.describe import manifest_of
from surgery.onnx.dims import Axes, Dynamic, axes_of, dynamic_shapes, examples_for_tracing, fixed_dims, rename_dims
from surgery.onnx.finish import add_defaults, make_constants, mark_rules, require_inputs, tidy
from surgery.onnx.given import Given
from surgery.onnx.names import name_weights
from surgery.onnx.parity import ParityReport, verify_onnx
from surgery.onnx.prepare import PREPARE, Prepared, Settings
from surgery.onnx.program import Program, program_of
from surgery.onnx.writing import size_of, written

__all__ = ["ExportReport", "export_onnx"]


@dataclass
class ExportReport:
    """What an export did: the file, its manifest, what was told on the way, the seconds it took without the comparison,
    the bytes that were written, and the comparison."""

    path: Path
    manifest: Any
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    parity: ParityReport | None = None


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    adapters: Literal["merged", "constant", "slots"] = "merged",
    names: str | Sequence[str] | None = None,
    slot: str = "slot",
    slots_as: Literal["overridable", "inputs"] = "overridable",
    empty: Literal["rank0", "zeros1"] = "rank0",
    dynamic: Dynamic = True,
    opset: int | None = None,
    optimize: bool = True,
    optimize_for: Literal["ort"] | None = None,
    external_data: bool | int | None = None,
    strict: bool = False,
    cache: bool = False,
    verify: bool = True,
    atol: float | None = None,
) -> ExportReport:
    """Write a model as ONNX, compared with the live model before the file is put in its place.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from rules import LoraRule
    >>> from surgery import apply_rules, export_onnx
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    >>> model = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="red")
    >>> folder = tempfile.mkdtemp()
    >>> report = export_onnx(model, f"{folder}/model.onnx", x, adapters="slots")
    >>> [slot["name"] for slot in report.manifest["slots"]], report.manifest["free"]
    (['0.adapters.slot.A', '0.adapters.slot.B'], {'input': {'0': 'batch'}})
    >>> report.parity.ok
    True

    `adapters`: "merged", the base's own graph with the live adapters in its weights; "constant", their tensors as
    initialisers under their own names; "slots", places for the tensors that adapters bring at run time, each site with
    a rank of its own (`names`: of these adapters). What has no slot and is live is a constant, which is told; `strict`
    refuses it. `slot`: the name of the slots' own adapter. `slots_as`: "overridable" slots may be left out of a call,
    "inputs" are required; `empty`: what stands in them, tensors of rank 0, or ("zeros1") of one zero.
    `example_inputs`: a tensor, a tuple of arguments or a mapping of keywords. `dynamic`: batch and positions are free;
    or a mapping, input → axis → name; or False. `cache`: a decoder's file takes a cache and gives one.
    `opset`: 18 to 25. `optimize_for`: "ort" for onnxruntime's own operations. `external_data`: weights in a file
    beside it, or from how many bytes on. `verify`, `atol`: see `verify_onnx`.

    Weights keep their names and numbers, and nodes that rules put in carry the rule's name. The model is only read; it
    keeps its bits, flags, modes and hooks when the export fails, too, and an older file is then as it was.

    Raises `SurgeryError` for what can't be exported, and `ParityError` where the file computes something else.
    """
    started = time.perf_counter()
    how = Settings(adapters, slot, slots_as, empty, opset, optimize, optimize_for, strict)
    given = Given.of(model, with_cache(model, example_inputs) if cache else example_inputs)
    axes = axes_of(given, dynamic)
    traced = _to_trace(model, given, axes)
    prepared = PREPARE[adapters](model, given, names, how)
    with traced_path():
        program = program_of(prepared.model, traced, prepared.lifted, dynamic_shapes(traced, axes), how)
    manifest, free = _finish(program, prepared, model, axes, how)
    notices = [*prepared.notices, *fixed_dims(traced, axes, free), *_told_apart(model)]
    seconds, parity = time.perf_counter() - started, None
    with written(program.model, Path(path), manifest, external_data) as place:
        if verify:
            parity = verify_onnx(place, model, given, names, atol=atol)
    return ExportReport(Path(path), manifest, notices, seconds, size_of(Path(path)), parity)


def _to_trace(model: nn.Module, given: Given, axes: Axes) -> Given:
    """The example with two of what it has one of, as far as the model takes that."""
    examples = examples_for_tracing(given, axes)
    copy = sharing_copy(model) if len(examples) > 1 else model
    for one in examples[:-1]:
        with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(), traced_path():
            one.call(copy, one.copy())
            return one
    return examples[-1]


def _told_apart(model: nn.Module) -> list[str]:
    quick = [path for path, one in model.named_modules() if getattr(one, "enable_nested_tensor", False) is True]
    zeros = "torch's own kernel for evaluation writes zeros at padded positions, and the file what training computes"
    return [f"{path or 'the model'}: {zeros}" for path in quick]


def _finish(program: Program, prepared: Prepared, model: nn.Module, axes: Axes, how: Settings) -> Any:
    """Names, marks and defaults; gives the manifest, and which of the call's tensors have free sizes."""
    made = program.model
    names = [one.name for one in prepared.lifted]
    name_weights(made, dict(prepared.model.named_parameters(remove_duplicate=False)))
    named = {program.inputs[name]: free for name, free in axes.items()}
    own = {} if how.adapters == "constant" else prepared.dims()
    free = rename_dims(made, {**named, **own})
    if fixed := [name for name in own if name not in free]:
        why = f"tracing found that the size of {fixed[0]} decides what is computed"
        raise SurgeryError(
            "a slot can't be of any size", where=fixed[0], why=why, fix='adapters="constant" or "merged"'
        )
    mark_rules(made, prepared.marks())
    if how.adapters == "constant":
        make_constants(made, prepared.defaults)
    else:
        required = names if how.slots_as == "inputs" else ()
        add_defaults(made, prepared.defaults, required)
    tidy(made)
    require_inputs(made, () if how.adapters == "constant" else names, "naming")
    by_input = {name: free.get(value, {}) for name, value in program.inputs.items()}
    return manifest_of(program, prepared, model, free, how), by_input
