"""The live models with which a file is compared: without adapters, and with each adapter alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from surgery.errors import SurgeryError
from surgery.lifecycle.activation import active
from surgery.lifecycle.switching import weights_now
from surgery.merging.merge import ensure_unmerged
from surgery.onnx.calls.shared_copy import changing, leave_live, sharing_copy
from surgery.onnx.checking.adapter_transfer import slot_arrays
from surgery.onnx.checking.report import ParityReport
from surgery.onnx.runtime.adapter_file import read_adapter
from surgery.onnx.runtime.default_inputs import defaults_of
from surgery.onnx.runtime.manifest import Manifest
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import model_state

__all__ = ["Adapters", "Reference", "references"]

Adapters = str | Sequence[str] | Mapping[str, str | Path] | None


@dataclass
class Reference:
    """A model with which the file is compared, and the arrays for the file's slots.

    `compared`: False if the model only serves to measure the adapters' effect.
    """

    name: str
    model: nn.Module
    slot_arrays: Mapping[str, np.ndarray]
    compared: bool = True


def references(model: nn.Module, manifest: Manifest, adapters: Adapters, report: ParityReport) -> Iterator[Reference]:
    """Yields the base, then each adapter; notes in the report what can't be compared."""
    state = model_state(model)
    copy = sharing_copy(model, dequantise="rounding")
    if state is None:
        yield Reference("base", copy, {})
        return
    weights = weights_now(state)
    if manifest.adapters == "slots":  # slots hold adapters with the weight 1
        weights = {name: weight for name, weight in weights.items() if name in manifest.constants}
    with_only = _ModelWithOnly(model, ensure_unmerged(copy), weights)
    names = list(adapters) if isinstance(adapters, Mapping) else adapters
    if manifest.adapters != "slots":
        wanted = adapter_names(state, names) if names is not None else list(active(copy))
        yield Reference("base", with_only(), {}, compared=not wanted)
        if wanted:
            yield Reference(" + ".join(wanted), with_only(*wanted), {})
        return
    defaults = defaults_of(report.path, manifest) if manifest.slots_as == "inputs" else {}
    known_defaults = {name: array for name, array in defaults.items() if array is not None}
    constants = list(manifest.constants)
    if constants:
        report.notices.append(
            f"the file can't be compared without an adapter: rules of {', '.join(constants)} have no slot and are in it"
        )
    elif unknown := [name for name, array in defaults.items() if array is None]:
        report.notices.append(
            f"the file can't be compared without an adapter: its file of defaults lacks {', '.join(unknown[:3])}"
        )
    yield Reference(
        "base", with_only(), known_defaults, compared=not constants and len(known_defaults) == len(defaults)
    )
    for name in adapter_names(state, names):
        if constants and constants != [name]:
            report.notices.append(
                f"{name} can't be compared: rules of {', '.join(constants)} have no slot and are in the file"
            )
            continue
        file = adapters[name] if isinstance(adapters, Mapping) else None
        try:
            alone = with_only(name)
        except SurgeryError as error:  # a later adapter changed the base's weights and can't be removed alone
            report.notices.append(f"{name} can't be compared: {error.what}, {error.why}")
            continue
        arrays = slot_arrays(copy, name, manifest) if file is None else read_adapter(file, manifest)
        if unknown := [slot for slot in defaults if slot not in known_defaults and slot not in arrays]:
            report.notices.append(f"{name} can't be compared: the file of defaults lacks {', '.join(unknown[:3])}")
            continue
        yield Reference(name, alone, {**known_defaults, **arrays})


@dataclass
class _ModelWithOnly:
    """Returns the model with only the given adapters. Adapters that changed the base at their start are removed."""

    model: nn.Module
    copy: nn.Module
    weights: Mapping[str, float]

    def __call__(self, *names: str) -> nn.Module:
        model = sharing_copy(self.model, dequantise="rounding") if changing(self.copy) else self.copy
        leave_live(model, names, self.weights)
        return model
