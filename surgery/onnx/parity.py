"""An exported file beside the live model: every adapter, several sizes, with the runtime's optimiser and without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.activation import active
from surgery.errors import ParityError, SurgeryError
from surgery.merging import unmerged
from surgery.onnx.adapters import read_adapter
from surgery.onnx.caching import with_cache
from surgery.onnx.carried import slot_arrays
from surgery.onnx.copies import changing, leave_live, sharing_copy, traced_path
from surgery.onnx.decoding import Decoded, decode
from surgery.onnx.defaults import defaults_of
from surgery.onnx.given import Given, arrays_of, leaves_of, outputs_of
from surgery.onnx.holding import check_file, check_weights, opened, ran
from surgery.onnx.manifest import Manifest, read_manifest
from surgery.onnx.report import Compared, ParityReport, parity_error
from surgery.onnx.sizes import other_sizes
from surgery.onnx.turns import in_turn
from surgery.state import adapter_names, model_state

__all__ = ["ParityReport", "TOLERANCES", "verify_onnx"]

# What rounding in another order comes to, of the largest number of an output. float32: 6e-6 and less in real and random
# models (docs/onnx.md has them all) but for the deepest, EfficientNet-Lite0 with random LoRA on every convolution, with
# 1.5e-5; a wrong scale or weight is hundreds of times as much. float64 has parts in float32 in most models. The half
# precisions keep 11 and 8 bits, and are rounded between operations that the other side fuses: some tens of their last.
TOLERANCES = {"float32": 5e-5, "float64": 5e-5, "float16": 2e-2, "bfloat16": 1e-1}
TOKENS = 8

Adapters = str | Sequence[str] | Mapping[str, str | Path] | None


@dataclass
class Reference:
    """What the file has to compute: a name, the model that computes it, what is fed into the slots; `compared`: or
    only what the adapters' effect is measured from."""

    name: str
    model: nn.Module
    fed: Mapping[str, np.ndarray]
    compared: bool = True


@in_turn
def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: Any,
    adapters: Adapters = None,
    *,
    atol: float | None = None,
    providers: Sequence[str] | None = None,
) -> ParityReport:
    """Compare an exported file with the live model it was made of.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from rules import LoraRule
    >>> from surgery import apply_rules, export_onnx, verify_onnx
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4)
    >>> model = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="red")
    >>> path = f"{tempfile.mkdtemp()}/model.onnx"
    >>> file = export_onnx(model, path, x, adapters="slots", verify=False).path
    >>> report = verify_onnx(file, model, x)
    >>> report.ok, sorted({one.adapter for one in report.compared})
    (True, ['base', 'red'])

    Compared are: the weights in the file that have the model's names, to the bit; the outputs without an adapter and
    with each (`adapters`: those of these names; or name → `.onnx_adapter` file, to compare what the files hold with the
    model's adapters), as the example has them and at other sizes of what is free, with onnxruntime's optimiser and
    without; of decoders with a cache also eight tokens of greedy decoding. Differences are measured by the largest
    number of an output where that is above 1, and NaNs and infinities have to be in the same places. `atol`: what is
    allowed instead of `TOLERANCES`, for floating point. `report.moved` is how much each adapter changes the outputs:
    where that is within the tolerance, a notice says that the comparison tells nothing of it.

    Raises `ParityError` that names the worst output, with all comparisons as its `report`; `SurgeryError` for a file
    without a manifest, and where onnxruntime has no kernels for it. The model is only read.
    """
    manifest = read_manifest(path)
    given = _called(manifest, model, example_inputs)
    report = ParityReport(str(path))
    names = list(adapters) if isinstance(adapters, Mapping) else adapters
    _require_adapters(model, adapters)
    report.weights = check_weights(path, manifest, model, given, names)
    sessions = {level: opened(path, level, providers) for level in (True, False)}
    check_file(path, manifest, sessions[True])
    calls = other_sizes(given, manifest.inputs, manifest.free)
    drawn: set[int] | None = None
    first: dict[int, list[Tensor]] = {}
    with traced_path():
        for one in _references(model, manifest, adapters, report):
            for at, group in enumerate(calls):
                found = next(((s, c, e) for s, c in group if (e := _expected(one.model, c)) is not None), None)
                if found is None:
                    report.notices.append(f"{one.name} at {group[0][0]}: the model itself can't be called so")
                    continue
                sizes, call, expected = found
                if drawn is None:
                    drawn = _drawn(one.model, call, expected, manifest.outputs, report)
                if at not in first:  # the base, which comes first, or what can be called so when it can't
                    first[at] = expected
                else:
                    _effect(one.name, first[at], expected, drawn, report)
                for level, session in sessions.items() if one.compared else ():
                    feeds = {**arrays_of(call, manifest.inputs), **one.fed}
                    try:
                        outputs = ran(session, feeds, f"{one.name}, {sizes}")
                    except ParityError as error:
                        error.elsewhere = at > 0 and report.ok
                        raise
                    report.compared += _compared(one.name, sizes, level, manifest, expected, outputs, atol, drawn)
            if one.compared and not drawn:
                decoded = decode(one.model, given, path, manifest, one.name, one.fed, TOKENS)
                report.decoded += [decoded] if isinstance(decoded, Decoded) else []
                report.notices += [f"{one.name}: {decoded}"] if isinstance(decoded, str) else []
    if not report.ok:
        raise parity_error(report, list(adapters) if isinstance(adapters, Mapping) else ())
    _weigh(report)
    return report


def _called(manifest: Manifest, model: nn.Module, example_inputs: Any) -> Given:
    """The example as the file takes it: where that is with a cache, the text's first half goes into one."""
    given = Given.of(model, example_inputs)
    if manifest.cache and "past_key_values" not in given.values:
        given = Given.of(model, with_cache(model, given.example))
    names = [name for name, leaf in leaves_of(given.values) if isinstance(leaf, Tensor)]
    if len(names) != len(manifest.inputs):
        why = f"they have {', '.join(names)}, and the file takes {', '.join(manifest.inputs)}"
        raise SurgeryError("the example inputs are not those of the file", why=why, fix="give those of the export")
    return given


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
    only = _Only(model, unmerged(copy))
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

    def __call__(self, *names: str) -> nn.Module:
        made = sharing_copy(self.model) if changing(self.copy) else self.copy
        leave_live(made, names)
        return made


def _expected(reference: nn.Module, call: Given, seed: int = 0) -> list[Tensor] | None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return [one.detach().clone() for one in outputs_of(call.call(reference, call.copy()))]
        except Exception:  # such as positions past the last one
            return None


def _drawn(
    model: nn.Module, call: Given, expected: list[Tensor], outputs: Sequence[str], report: ParityReport
) -> set[int]:
    """Which outputs are drawn at random: the file draws other numbers."""
    again = _expected(model, call, seed=1) or []
    found = {i for i, (one, other) in enumerate(zip(expected, again, strict=False)) if difference(one, other)}
    if found and len(found) == len(expected):
        raise ParityError(
            "the file can't be compared with the model",
            why="two calls of the model itself differ: it draws random numbers in evaluation mode",
            fix="verify=False writes it as it is",
        )
    report.notices += [f"{outputs[i]}: the model draws it at random" for i in sorted(found) if i < len(outputs)]
    return found


def _effect(
    name: str, base: list[Tensor], expected: list[Tensor], drawn: Collection[int], report: ParityReport
) -> None:
    """Note how far an adapter takes the outputs from the base's; one that gets longer by it tells nothing of that."""
    pairs = [pair for i, pair in enumerate(zip(base, expected, strict=False)) if i not in drawn]
    far = [difference(*pair) for pair in pairs if pair[0].is_floating_point() and pair[0].shape == pair[1].shape]
    report.moved[name] = max([report.moved.get(name, 0.0), *far]) if far else float("inf")


def _weigh(report: ParityReport) -> None:
    for name, moved in report.moved.items():
        allowed = max((one.tolerance for one in report.compared if one.adapter == name), default=0.0)
        if moved <= allowed:
            why = "that they are equal tells nothing of it"
            report.notices.append(f"{name} moves the outputs by {moved:.1e}, within the tolerance: {why}")


def _compared(
    name: str,
    sizes: str,
    level: bool,
    manifest: Manifest,
    expected: list[Tensor],
    found: list[Any],
    atol: float | None,
    drawn: Collection[int],
) -> list[Compared]:
    if len(expected) != len(found):
        raise ParityError(f"the file has {len(found)} outputs, and the model {len(expected)}", where=name)
    made = []
    for i, (output, want, have) in enumerate(zip(manifest.outputs, expected, found, strict=True)):
        allowed = TOLERANCES.get(str(want.dtype).removeprefix("torch."), 0.0)
        tolerance = atol if atol is not None and allowed else allowed
        if i not in drawn:
            made.append(Compared(name, sizes, level, output, difference(want, have), tolerance))
    return made


def difference(want: Tensor, have: Any) -> float:
    """The largest difference, of the largest number where that is above 1; infinite where shapes or NaNs differ."""
    expected = want.detach().cpu().double().numpy()
    found = have.detach().cpu().double().numpy() if isinstance(have, Tensor) else np.asarray(have).astype(np.float64)
    if expected.shape != found.shape or not np.array_equal(np.isnan(expected), np.isnan(found)):
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    expected, found = expected[finite], found[finite]
    return float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))
