"""Exports rewritten models as ONNX: adapters folded in, as constants, or as slots for many adapters of one file."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surgery.errors import ParityError, SurgeryError, abbreviate
from surgery.onnx.calls.example import ExampleCall, array_of
from surgery.onnx.calls.export_lock import one_at_a_time
from surgery.onnx.calls.exported_model import check_names, exported_root
from surgery.onnx.calls.kv_cache_example import with_cache
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy, traced_path
from surgery.onnx.checking.parity import ParityReport, verify_onnx
from surgery.onnx.graph.dynamic_axes import (
    Axes,
    Dynamic,
    axes_of,
    dynamic_shapes,
    examples_for_tracing,
    fixed_axis_notices,
    rename_dims,
    with_longer_texts,
)
from surgery.onnx.graph.export_notices import notices_of
from surgery.onnx.graph.file_writing import size_of, write_model
from surgery.onnx.graph.finish import add_defaults, make_constants, mark_rules, require_inputs, tidy
from surgery.onnx.graph.generate_differences import GENERATION, generation_of
from surgery.onnx.graph.manifest_description import manifest_of
from surgery.onnx.graph.packed_weights import codes_of, pack_weights
from surgery.onnx.graph.prepare import BLOCKS, PREPARE, ExportSettings, Prepared
from surgery.onnx.graph.trace_program import Program, program_of
from surgery.onnx.graph.weight_names import name_weights
from surgery.onnx.runtime.default_inputs import write_defaults
from surgery.onnx.runtime.manifest import Manifest
from surgery.progress import Progress, steps
from surgery.results import Report
from surgery.state.records import model_state
from surgery.transaction.neutral_context import neutrally

__all__ = ["ExportReport", "export_onnx"]


@dataclass
class ExportReport(Report):
    """The result of an export.

    Attributes:
        path: the file.
        manifest: the file's manifest, as plain data.
        notices: what a user should know of the export.
        seconds: duration without the comparison.
        nbytes: bytes written.
        parity: the comparison; None without `verify`.
    """

    path: Path
    manifest: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    parity: ParityReport | None = None

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each comparison, with the file's path, bytes and seconds; one row without a comparison."""
        file = {"path": str(self.path), "nbytes": self.nbytes, "seconds": self.seconds}
        return [{**file, **row} for row in self.parity.to_rows()] if self.parity is not None else [file]

    def __str__(self) -> str:
        manifest, slots = self.manifest, len(self.manifest["slots"])
        slot_count = f", {slots} slots at {len(manifest['sites'])} sites" if slots else ""
        what = f"{self.path.name}: {self.nbytes:,} bytes, opset {manifest['opset']}, {manifest['adapters']}{slot_count}"
        lines = [f"{what}; {self.seconds:.1f} s", *(f"note: {notice}" for notice in self.notices)]
        return "\n".join([*lines, *([str(self.parity)] if self.parity is not None else [])])


@one_at_a_time
@neutrally(collects=True)
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
    weights: Literal["dequantised", "packed"] = "dequantised",
    external_data: bool | int | None = None,
    strict: bool = False,
    cache: bool = False,
    verify: bool = True,
    atol: float | None = None,
    progress: Progress = False,
) -> ExportReport:
    """Write a model as ONNX, compared with the live model before the file replaces the one at `path`.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules, export_onnx
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> for name, rank in (("red", 2), ("blue", 4)):
    ...     _ = apply_rules(model, LoraRule(["0", "2"], rank=rank, init="random"), adapter=name)
    >>> file = f"{tempfile.mkdtemp()}/model.onnx"
    >>> report = export_onnx(model, file, torch.ones(3, 8), adapters="slots")
    >>> [slot["name"] for slot in report.manifest["slots"][:2]], report.parity.ok
    (['0.adapters.slot.A', '0.adapters.slot.B'], True)

    The model is not changed: a copy that shares its memory is exported, in evaluation mode.

    Args:
        model: a rewritten or plain model, a module that contains one, or its wrapper of torch.compile, DataParallel or
            DistributedDataParallel.
        path: the file.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        adapters: "merged" (default): live adapters (or `names`) are folded into the weights with their weight; the
            graph is
            the base's. "constant": they stay as they are, each tensor an initialiser
            `<site>.adapters.<adapter>.<tensor>` with its own shape. "slots": instead of all adapters (or `names`) the
            file has slots `<site>.adapters.<slot>.<tensor>`, optional inputs of any rank, which change nothing unless
            they are fed. `export_adapter` writes files for them, for these adapters and later ones, and `OnnxRunner`
            runs them. A live rule without a slot becomes a constant, and a notice says so; with `strict` it is an
            error.
        names: adapters; default None: see `adapters`.
        slot: the slots' name; default "slot".
        slots_as: "overridable" (default): slots need not be fed. "inputs": they must be, for runtimes without optional
            inputs.
        empty: "rank0" (default) or "zeros1": unfed slots have rank 0, or rank 1 for runtimes without empty tensors.
        dynamic: which sizes are free: True (default): those of batches, texts and caches; False: none; or a mapping
            input →
            axis → name. Notices list sizes that became fixed.
        opset: 18 to 25; default None: the exporter's.
        optimize: run the exporter's optimiser; default True.
        optimize_for: "ort" fuses attention and norms into onnxruntime's own operations; default None.
        weights: how quantised weights are written. "dequantised" (default): as plain numbers. "packed": as codes and
            scales with DequantizeLinear (int8 by row, 4 and 8 bits in blocks; opset 21). Weights of other layouts, and
            those with merged adapters, stay plain numbers, and a notice names them.
        external_data: weights in a file beside the graph: True, False, or from so many bytes on; default None: from 1.5
            GiB.
        strict: see "slots"; default False.
        cache: a decoder's file takes and returns a cache; default False.
        verify: compare the file with the model, see `verify_onnx`; default True.
        atol: replaces the tolerances of `verify_onnx`; default None.
        progress: as in `apply_rules`; the steps are prepare, trace, finish, write and verify. Default False.

    Returns:
        A report, which prints as tables.

    Raises:
        SurgeryError: the model can't be exported.
        ParityError: the file computes something else. After an error the previous file at `path` stays.

    Notes:
        The manifest is in the file's metadata and in `<file>.manifest.json`.
    """
    if weights == "packed" and opset is None:
        opset = BLOCKS
    how = ExportSettings(adapters, slot, slots_as, empty, opset, optimize, optimize_for, strict, weights)
    given_model, model = model, exported_root(model)
    check_names(model, names)
    example = ExampleCall.of(model, with_cache(model, example_inputs) if cache else example_inputs)
    axes = axes_of(example, dynamic)

    def exported(traced: ExampleCall) -> ExportReport:
        with steps(progress, "export", 5) as step:
            started = time.perf_counter()
            prepared = PREPARE[adapters](model, example, names, how)
            step()
            with traced_path():
                program = program_of(prepared.model, traced, prepared.lifted, dynamic_shapes(traced, axes), how)
            step()
            manifest, free = _finish(program, prepared, model, axes, how)
            if "logits" in manifest["outputs"] and (generation := generation_of(model, example)):
                manifest[GENERATION] = generation
            staying = pack_weights(program.model, codes_of(model)) if weights == "packed" else []
            notices = [
                *prepared.notices,
                *([f"{abbreviate(staying, 'weights')} stay plain numbers in the file"] if staying else []),
                *fixed_axis_notices(traced, axes, free, _taking(model, adapters)),
                *notices_of(given_model, model, manifest),
            ]
            step()
            seconds, parity = time.perf_counter() - started, None
            with write_model(program.model, Path(path), manifest, external_data) as place:
                if adapters == "slots" and slots_as == "inputs":
                    arrays = {name: array_of(tensor) for name, tensor in prepared.defaults.items()}
                    write_defaults(place, arrays, Manifest.of(manifest))
                step()
                if verify:
                    parity = verify_onnx(place, model, example, names, atol=atol)
                step()  # before the file moves to its path: an error of the user's function leaves no file
            return ExportReport(Path(path), manifest, notices, seconds, size_of(Path(path)), parity)

    traced = _to_trace(model, examples_for_tracing(example, axes), adapters)
    try:
        return exported(traced)
    except ParityError as error:
        other = with_longer_texts(traced, axes)
        if not error.elsewhere or _to_trace(model, [other, traced], adapters) is traced:
            raise
        with contextlib.suppress(SurgeryError):
            return exported(other)
        raise


def _to_trace(model: nn.Module, examples: Sequence[ExampleCall], adapters: str) -> ExampleCall:
    """The first example that the model can be called with, or the last."""
    takes = _taking(model, adapters)
    return next((example for example in examples[:-1] if takes(example)), examples[-1])


def _taking(model: nn.Module, adapters: str) -> Callable[[ExampleCall], bool]:
    """Returns a function that tells whether a copy of the model, made at its first call, accepts an example.

    A file with slots is the base's, too: it may be called like the model without adapters, which has no prompts that
    refuse a cache without their virtual tokens.
    """
    copies: list[nn.Module] = []
    ways = [lambda: sharing_copy(model)]
    if adapters == "slots" and model_state(model) is not None:
        ways.append(lambda: _without_adapters(model))

    def takes(example: ExampleCall) -> bool:
        for i, way in enumerate(ways):
            with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(), traced_path():
                if i == len(copies):
                    copies.append(way())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    example.call(copies[i], example.copy())
                return True
        return False

    return takes


def _without_adapters(model: nn.Module) -> nn.Module:
    copy = sharing_copy(model)
    leave_live(copy, ())
    return copy


def _finish(program: Program, prepared: Prepared, model: nn.Module, axes: Axes, how: ExportSettings) -> Any:
    """Adds names, marks and defaults; returns the manifest, and which of the call's tensors have free sizes."""
    graph_model = program.model
    names = [lifted.name for lifted in prepared.lifted]
    name_weights(graph_model, dict(prepared.model.named_parameters(remove_duplicate=False)))
    named = {program.inputs[name]: free for name, free in axes.items()}
    own = {} if how.adapters == "constant" else prepared.dims()
    free = rename_dims(graph_model, {**named, **own})
    if fixed := [name for name in own if name not in free]:
        why = f"tracing found that the size of {fixed[0]} decides what is computed"
        raise SurgeryError(
            "a slot can't be of any size", where=fixed[0], why=why, fix='adapters="constant" or "merged"'
        )
    mark_rules(graph_model, prepared.marks())
    if how.adapters == "constant":
        make_constants(graph_model, prepared.defaults)
    else:
        required = names if how.slots_as == "inputs" else ()
        add_defaults(graph_model, prepared.defaults, required)
    tidy(graph_model)
    require_inputs(graph_model, () if how.adapters == "constant" else names, "naming")
    by_input = {name: free.get(value, {}) for name, value in program.inputs.items()}
    return manifest_of(program, prepared, model, free, how), by_input
