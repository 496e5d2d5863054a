"""Compares an exported file with the live model: all adapters, several calls, with and without the optimiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.arithmetic.float64_reference import difference
from surgery.errors import ParityError, SurgeryError
from surgery.onnx.calls.example import ExampleCall, arrays_of, leaves_of
from surgery.onnx.calls.export_lock import one_at_a_time
from surgery.onnx.calls.exported_model import check_names, exported_root
from surgery.onnx.calls.kv_cache_example import with_cache
from surgery.onnx.calls.resized_calls import other_sizes
from surgery.onnx.calls.shared_copy import traced_path
from surgery.onnx.calls.varied_values import other_values
from surgery.onnx.checking.fast_path import fast_path_notices
from surgery.onnx.checking.file_checks import check_file, check_weights, open_for_check, run_session
from surgery.onnx.checking.generation_parity import decode
from surgery.onnx.checking.output_differences import TOLERANCES, Call, Comparison, expected_of
from surgery.onnx.checking.references import Adapters, references
from surgery.onnx.checking.report import Compared, Decoded, ParityReport, parity_error
from surgery.onnx.runtime.manifest import Manifest, read_manifest
from surgery.state.records import model_state
from surgery.transaction.neutral_context import neutrally

__all__ = ["ParityReport", "TOLERANCES", "verify_onnx"]

TOKENS = 8


@one_at_a_time
@neutrally(collects=True)
def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any,
    adapters: Adapters = None,
    *,
    atol: float | None = None,
    providers: Sequence[str] | None = None,
) -> ParityReport:
    """Compare an exported file with the live model that it was made of.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules, export_onnx, verify_onnx
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    >>> model = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="red")
    >>> path = f"{tempfile.mkdtemp()}/model.onnx"
    >>> file = export_onnx(model, path, x, adapters="slots", verify=False).path
    >>> report = verify_onnx(file, model, x)
    >>> report.ok, sorted({result.adapter for result in report.compared})
    (True, ['base', 'red'])

    The comparison covers: the weights in the file that have the model's names, to the bit; the outputs without an
    adapter and with each adapter, for the example, for other free sizes and for other values (padded texts, masks with
    an empty row, one token repeated, zeros, large numbers), with onnxruntime's optimiser and without; and, for decoders
    with a cache, eight tokens of greedy decoding.

    Args:
        path: the file.
        model: the model; it is only read.
        example_inputs: as in `export_onnx`.
        adapters: names of adapters to compare; or name → `.onnx_adapter` file, to compare the files with the model's
            adapters; default None: all.
        atol: allowed difference of floating-point outputs; default None: `TOLERANCES` of the dtype. If the model itself
            loses more, eight times its difference from the same model in float64, up to `LARGEST`.
        providers: onnxruntime's execution providers; default None: the CPU's.

    Returns:
        A report. Its `moved` says how much each adapter changes the outputs. If that is within the tolerance, a notice
        says that the comparison shows nothing about the adapter.

    Raises:
        ParityError: names the worst output; its `report` has all comparisons. A difference that only other values cause
            is a notice, except for padded texts.
        SurgeryError: the file has no manifest, or onnxruntime has no kernels for it.

    Notes:
        A difference is divided by the output's largest number if that is above 1. NaNs and infinities must be in the
        same places.
    """
    model = exported_root(model)
    manifest = read_manifest(path)
    example = _example_for_file(manifest, model, example_inputs)
    report = ParityReport(str(path))
    names = list(adapters) if isinstance(adapters, Mapping) else adapters
    check_names(model, names)
    _require_adapters(model, adapters)
    report.weights = check_weights(path, manifest, model, example, names)
    sessions = {level: open_for_check(path, level, providers) for level in (True, False)}
    report.notices += check_file(path, manifest, sessions[True])
    calls = _calls(example, manifest)
    random_outputs: set[int] | None = None
    base_outputs: dict[int, list[Tensor]] = {}
    with traced_path():
        for number, reference in enumerate(references(model, manifest, adapters, report)):
            if not number:
                report.notices += fast_path_notices(reference.model, [call for (call, *_) in calls if call.values])
            comparison = Comparison(reference.name, reference.model, manifest.outputs, atol)
            for index, group in enumerate(calls):
                accepted = next(
                    (
                        (call, outputs)
                        for call in group
                        if (outputs := expected_of(reference.model, call.example)) is not None
                    ),
                    None,
                )
                if accepted is None:
                    if not group[0].values:
                        report.notices.append(
                            f"{reference.name} at {group[0].sizes}: the model itself refuses this call"
                        )
                    continue
                call, expected = accepted
                if random_outputs is None:
                    random_outputs = _random_outputs(reference.model, call.example, expected, manifest.outputs, report)
                if (
                    index not in base_outputs
                ):  # the base comes first; if it can't be called so, the first adapter that can
                    base_outputs[index] = expected
                elif not call.values:
                    _note_effect(reference.name, base_outputs[index], expected, random_outputs, report)
                comparison.random_outputs = random_outputs
                for level, session in sessions.items() if reference.compared else ():
                    feeds = {**arrays_of(call.example, manifest.inputs), **reference.slot_arrays}
                    try:
                        outputs = run_session(session, feeds, f"{reference.name}, {call.values or call.sizes}")
                    except ParityError as error:
                        if call.edge:
                            report.notices.append(f"{error.where}: onnxruntime can't run the file, {error.why}")
                            continue
                        error.elsewhere = index > 0 and report.ok
                        raise
                    report.compared += comparison.of(call, level, expected, outputs)
            if reference.compared and not random_outputs:
                decoded = decode(
                    reference.model, example, path, manifest, reference.name, reference.slot_arrays, TOKENS
                )
                report.decoded += [decoded] if isinstance(decoded, Decoded) else []
                report.notices += [f"{reference.name}: {decoded}"] if isinstance(decoded, str) else []
    if not report.ok:
        raise parity_error(report, list(adapters) if isinstance(adapters, Mapping) else ())
    _note_small_effects(report)
    _note_edge_cases(report)
    return report


def _calls(call: ExampleCall, manifest: Manifest) -> list[list[Call]]:
    """Returns groups of calls with other sizes and values. The first of a group that the model accepts is compared."""
    calls = other_sizes(call, manifest.inputs, manifest.free)
    sizes, example = calls[0][0]
    values = [Call(sizes, varied.call, varied.description, varied.edge) for varied in other_values(example)]
    return [[Call(*arguments) for arguments in group] for group in calls] + [[arguments] for arguments in values]


def _example_for_file(manifest: Manifest, model: nn.Module, example_inputs: Any) -> ExampleCall:
    """Returns the example for this file. If the file takes a cache, the text's first half goes into a cache."""
    example = ExampleCall.of(model, example_inputs)
    if manifest.cache and "past_key_values" not in example.values:
        example = ExampleCall.of(model, with_cache(model, example.example))
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    if len(names) != len(manifest.inputs):
        why = f"they have {', '.join(names)}, and the file takes {', '.join(manifest.inputs)}"
        raise SurgeryError(
            "the example inputs are not those of the file", why=why, fix="give the example inputs of the export"
        )
    return example


def _require_adapters(model: nn.Module, adapters: Adapters) -> None:
    state = model_state(model)
    for name in adapters if isinstance(adapters, Mapping) else ():
        if state is None or name not in state.adapters:
            why = "a file is compared with the live model's adapter of that name, and the model has none"
            fix = f"load_adapter(model, …, {name!r}) first"
            raise SurgeryError(f"the adapter {name!r} can't be compared", why=why, fix=fix)


def _random_outputs(
    model: nn.Module, call: ExampleCall, expected: list[Tensor], outputs: Sequence[str], report: ParityReport
) -> set[int]:
    """Returns the indices of random outputs, in which two calls of the model differ. The file draws other numbers."""
    again = expected_of(model, call, seed=1) or []
    indices = {i for i, (first, other) in enumerate(zip(expected, again, strict=False)) if difference(first, other)}
    if indices and len(indices) == len(expected):
        raise ParityError(
            "the file can't be compared with the model",
            why="two calls of the model itself differ: it draws random numbers in evaluation mode",
            fix="verify=False writes it as it is",
        )
    report.notices += [f"{outputs[i]}: the model draws it at random" for i in sorted(indices) if i < len(outputs)]
    return indices


def _note_effect(
    name: str, base: list[Tensor], expected: list[Tensor], random_outputs: Collection[int], report: ParityReport
) -> None:
    """Notes how much an adapter changes the outputs. Outputs whose shape it changes are skipped."""
    pairs = [pair for i, pair in enumerate(zip(base, expected, strict=False)) if i not in random_outputs]
    distances = [difference(*pair) for pair in pairs if pair[0].is_floating_point() and pair[0].shape == pair[1].shape]
    report.moved[name] = max([report.moved.get(name, 0.0), *distances]) if distances else float("inf")


def _note_edge_cases(report: ParityReport) -> None:
    """Adds a notice for each kind of edge case in which the file differs from the model."""
    differing: dict[str, list[Compared]] = {}
    for comparison in report.compared:
        if not comparison.ok:
            differing.setdefault(comparison.values, []).append(comparison)
    for values, comparisons in differing.items():
        most = max(comparisons, key=lambda comparison: comparison.difference)
        names = ", ".join(dict.fromkeys(comparison.adapter for comparison in comparisons))
        report.notices.append(
            f"with {values} the file and the model differ ({names}: {most.output} by "
            f"{most.difference:.1e}); with the example's values they agree"
        )


def _note_small_effects(report: ParityReport) -> None:
    """Adds a notice for each adapter whose effect is within the tolerance."""
    for name, moved in report.moved.items():
        tolerances = [
            comparison.tolerance for comparison in report.compared if comparison.adapter == name and not comparison.edge
        ]
        allowed = max(tolerances, default=0.0)
        if moved <= allowed:
            why = "the comparison shows nothing about this adapter"
            report.notices.append(f"{name} moves the outputs by {moved:.1e}, within the tolerance: {why}")
