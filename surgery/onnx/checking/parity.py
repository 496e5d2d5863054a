"""An exported file beside the live model: every adapter, several sizes, with the runtime's optimiser and without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgery.arithmetic.float64_reference import difference
from surgery.errors import ParityError, SurgeryError
from surgery.lifecycle.activation import active
from surgery.lifecycle.switching import weights_now
from surgery.merging.merge import ensure_unmerged
from surgery.onnx.calls.example import ExampleCall, arrays_of, leaves_of
from surgery.onnx.calls.export_turns import in_turn
from surgery.onnx.calls.exported_model import check_names, rooted
from surgery.onnx.calls.kv_cache_example import with_cache
from surgery.onnx.calls.other_values import other_values
from surgery.onnx.calls.resized_calls import other_sizes
from surgery.onnx.calls.shared_copy import changing, leave_live, sharing_copy, traced_path
from surgery.onnx.checking.adapter_transfer import slot_arrays
from surgery.onnx.checking.fast_path import told_apart
from surgery.onnx.checking.file_checks import check_file, check_weights, opened, ran
from surgery.onnx.checking.generation_parity import decode
from surgery.onnx.checking.output_differences import TOLERANCES, Call, Comparison, expected_of
from surgery.onnx.checking.report import Compared, Decoded, ParityReport, parity_error
from surgery.onnx.runtime.adapter_file import read_adapter
from surgery.onnx.runtime.default_inputs import defaults_of
from surgery.onnx.runtime.manifest import Manifest, read_manifest
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import model_state
from surgery.transaction.neutral_context import neutrally

__all__ = ["ParityReport", "TOLERANCES", "verify_onnx"]

TOKENS = 8

Adapters = str | Sequence[str] | Mapping[str, str | Path] | None


@dataclass
class Reference:
    """A model that the file is compared with, and what is fed into the slots.

    `compared`: False for a model from which only the adapters' effect is measured.
    """

    name: str
    model: nn.Module
    fed: Mapping[str, np.ndarray]
    compared: bool = True


@in_turn
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
    >>> report.ok, sorted({one.adapter for one in report.compared})
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
    model = rooted(model)
    manifest = read_manifest(path)
    example = _called(manifest, model, example_inputs)
    report = ParityReport(str(path))
    names = list(adapters) if isinstance(adapters, Mapping) else adapters
    check_names(model, names)
    _require_adapters(model, adapters)
    report.weights = check_weights(path, manifest, model, example, names)
    sessions = {level: opened(path, level, providers) for level in (True, False)}
    report.notices += check_file(path, manifest, sessions[True])
    calls = _calls(example, manifest)
    drawn: set[int] | None = None
    first: dict[int, list[Tensor]] = {}
    with traced_path():
        for number, reference in enumerate(_references(model, manifest, adapters, report)):
            if not number:
                report.notices += told_apart(reference.model, [call for (call, *_) in calls if call.values])
            comparison = Comparison(reference.name, reference.model, manifest.outputs, atol)
            for at, group in enumerate(calls):
                accepted = next(
                    ((c, e) for c in group if (e := expected_of(reference.model, c.given)) is not None), None
                )
                if accepted is None:
                    if not group[0].values:
                        report.notices.append(
                            f"{reference.name} at {group[0].sizes}: the model itself can't be called so"
                        )
                    continue
                call, expected = accepted
                if drawn is None:
                    drawn = _drawn(reference.model, call.given, expected, manifest.outputs, report)
                if at not in first:  # the base, which comes first, or what can be called so when it can't
                    first[at] = expected
                elif not call.values:
                    _effect(reference.name, first[at], expected, drawn, report)
                comparison.drawn = drawn
                for level, session in sessions.items() if reference.compared else ():
                    feeds = {**arrays_of(call.given, manifest.inputs), **reference.fed}
                    try:
                        outputs = ran(session, feeds, f"{reference.name}, {call.values or call.sizes}")
                    except ParityError as error:
                        if call.edge:
                            report.notices.append(f"{error.where}: onnxruntime can't run the file, {error.why}")
                            continue
                        error.elsewhere = at > 0 and report.ok
                        raise
                    report.compared += comparison.of(call, level, expected, outputs)
            if reference.compared and not drawn:
                decoded = decode(reference.model, example, path, manifest, reference.name, reference.fed, TOKENS)
                report.decoded += [decoded] if isinstance(decoded, Decoded) else []
                report.notices += [f"{reference.name}: {decoded}"] if isinstance(decoded, str) else []
    if not report.ok:
        raise parity_error(report, list(adapters) if isinstance(adapters, Mapping) else ())
    _weigh(report)
    _tell_edges(report)
    return report


def _calls(call: ExampleCall, manifest: Manifest) -> list[list[Call]]:
    """The example at its sizes and at others, in groups of which the first that the model takes is compared; and with
    other values."""
    calls = other_sizes(call, manifest.inputs, manifest.free)
    sizes, example = calls[0][0]
    values = [Call(sizes, varied.call, varied.description, varied.edge) for varied in other_values(example)]
    return [[Call(*arguments) for arguments in group] for group in calls] + [[arguments] for arguments in values]


def _called(manifest: Manifest, model: nn.Module, example_inputs: Any) -> ExampleCall:
    """The example as the file takes it: where that is with a cache, the text's first half goes into one."""
    example = ExampleCall.of(model, example_inputs)
    if manifest.cache and "past_key_values" not in example.values:
        example = ExampleCall.of(model, with_cache(model, example.example))
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    if len(names) != len(manifest.inputs):
        why = f"they have {', '.join(names)}, and the file takes {', '.join(manifest.inputs)}"
        raise SurgeryError("the example inputs are not those of the file", why=why, fix="give those of the export")
    return example


def _require_adapters(model: nn.Module, adapters: Adapters) -> None:
    state = model_state(model)
    for name in adapters if isinstance(adapters, Mapping) else ():
        if state is None or name not in state.adapters:
            why = "a file is compared with the live model's adapter of that name, and the model has none"
            fix = f"load_adapter(model, …, {name!r}) first"
            raise SurgeryError(f"the adapter {name!r} can't be compared", why=why, fix=fix)


def _references(model: nn.Module, manifest: Manifest, adapters: Adapters, report: ParityReport) -> Iterator[Reference]:
    state = model_state(model)
    copy = sharing_copy(model)
    if state is None:
        yield Reference("base", copy, {})
        return
    weights = weights_now(state)
    if manifest.adapters == "slots":  # which hold an adapter as it is with the weight 1
        weights = {name: weight for name, weight in weights.items() if name in manifest.constants}
    only = _Only(model, ensure_unmerged(copy), weights)
    names = list(adapters) if isinstance(adapters, Mapping) else adapters
    if manifest.adapters != "slots":
        wanted = adapter_names(state, names) if names is not None else list(active(copy))
        yield Reference("base", only(), {}, compared=not wanted)
        if wanted:
            yield Reference(" + ".join(wanted), only(*wanted), {})
        return
    defaults = defaults_of(report.path, manifest) if manifest.slots_as == "inputs" else {}
    fed = {name: array for name, array in defaults.items() if array is not None}
    constants = list(manifest.constants)
    if constants:
        report.notices.append(f"the file without an adapter: it holds what has no slot of {', '.join(constants)}")
    elif lacking := [name for name, array in defaults.items() if array is None]:
        report.notices.append(f"the file without an adapter: nothing stands beside it for {', '.join(lacking[:3])}")
    yield Reference("base", only(), fed, compared=not constants and len(fed) == len(defaults))
    for name in adapter_names(state, names):
        if constants and constants != [name]:
            report.notices.append(f"{name}: the file holds what has no slot of {', '.join(constants)}")
            continue
        file = adapters[name] if isinstance(adapters, Mapping) else None
        try:
            alone = only(name)
        except SurgeryError as error:  # what changed the base's weights after it can't be taken off without it
            report.notices.append(f"{name} can't be compared: {error.what}, {error.why}")
            continue
        arrays = slot_arrays(copy, name, manifest) if file is None else read_adapter(file, manifest)
        if lost := [slot for slot in defaults if slot not in fed and slot not in arrays]:
            report.notices.append(f"{name}: nothing stands beside the file for {', '.join(lost[:3])}")
            continue
        yield Reference(name, alone, {**fed, **arrays})


@dataclass
class _Only:
    """The model with some adapters alone; without those that changed the base at their start, as the file's base is."""

    model: nn.Module
    copy: nn.Module
    weights: Mapping[str, float]

    def __call__(self, *names: str) -> nn.Module:
        model = sharing_copy(self.model) if changing(self.copy) else self.copy
        leave_live(model, names, self.weights)
        return model


def _drawn(
    model: nn.Module, call: ExampleCall, expected: list[Tensor], outputs: Sequence[str], report: ParityReport
) -> set[int]:
    """Which outputs are drawn at random: the file draws other numbers."""
    again = expected_of(model, call, seed=1) or []
    unsteady = {i for i, (first, other) in enumerate(zip(expected, again, strict=False)) if difference(first, other)}
    if unsteady and len(unsteady) == len(expected):
        raise ParityError(
            "the file can't be compared with the model",
            why="two calls of the model itself differ: it draws random numbers in evaluation mode",
            fix="verify=False writes it as it is",
        )
    report.notices += [f"{outputs[i]}: the model draws it at random" for i in sorted(unsteady) if i < len(outputs)]
    return unsteady


def _effect(
    name: str, base: list[Tensor], expected: list[Tensor], drawn: Collection[int], report: ParityReport
) -> None:
    """Note how far an adapter takes the outputs from the base's; one that gets longer by it tells nothing of that."""
    pairs = [pair for i, pair in enumerate(zip(base, expected, strict=False)) if i not in drawn]
    far = [difference(*pair) for pair in pairs if pair[0].is_floating_point() and pair[0].shape == pair[1].shape]
    report.moved[name] = max([report.moved.get(name, 0.0), *far]) if far else float("inf")


def _tell_edges(report: ParityReport) -> None:
    """One notice for each kind of values at which the file parts from the model."""
    apart: dict[str, list[Compared]] = {}
    for comparison in report.compared:
        if not comparison.ok:
            apart.setdefault(comparison.values, []).append(comparison)
    for values, comparisons in apart.items():
        most = max(comparisons, key=lambda comparison: comparison.difference)
        names = ", ".join(dict.fromkeys(comparison.adapter for comparison in comparisons))
        report.notices.append(
            f"with {values} the file gives other numbers than the model ({names}: {most.output} is "
            f"{most.difference:.1e} off); with the example's values it gives the model's"
        )


def _weigh(report: ParityReport) -> None:
    for name, moved in report.moved.items():
        own = [
            comparison.tolerance for comparison in report.compared if comparison.adapter == name and not comparison.edge
        ]
        allowed = max(own, default=0.0)
        if moved <= allowed:
            why = "that they are equal tells nothing of it"
            report.notices.append(f"{name} moves the outputs by {moved:.1e}, within the tolerance: {why}")
