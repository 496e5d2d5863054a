"""The adapters that are loaded for an exported file, and the values of the file's slots for one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.runtime.adapter_check import listed
from surgery.onnx.runtime.adapter_file import read_values
from surgery.onnx.runtime.default_inputs import DEFAULTS, defaults_of
from surgery.onnx.runtime.dtypes import array_of_value, dtype_of, value_of
from surgery.onnx.runtime.feeds import Input
from surgery.onnx.runtime.manifest import Manifest

__all__ = ["Adapter", "LoadedAdapters"]

Adapter = str | Sequence[str] | None


@dataclass(frozen=True)
class _Loaded:
    name: str
    values: Mapping[str, Any]  # OrtValues by slot
    sites: frozenset[tuple[str, str]]


class LoadedAdapters:
    """Loads and unloads adapters of one file, safely beside calls of other threads.

    `required`, `overridable`: the session's inputs by name. Raises `SurgeryError` if they lack slots of the manifest.
    """

    def __init__(
        self, path: Path, manifest: Manifest, required: Mapping[str, Input], overridable: Mapping[str, Input]
    ) -> None:
        self.path, self.manifest = path, manifest
        slots, inputs = manifest.by_name, {**required, **overridable}
        # A program that rewrote the file may have changed its slots' precision; the manifest has the old one.
        self._converted_dtypes = {
            name: inputs[name].dtype
            for name, slot in slots.items()
            if name in inputs and inputs[name].dtype != slot.dtype
        }
        if missing := [name for name in slots if name not in inputs]:
            why = f"{len(missing)} of {len(slots)}, such as {missing[0]}: a program that rewrote it made them constants"
            fix = 'export it with slots_as="inputs", which such programs keep; or use the file as it was exported'
            raise SurgeryError(f"{path.name} has lost its slots", why=why, fix=fix)
        self._defaults = self._required_defaults([name for name in slots if name in required])
        self._adapters: Mapping[str, _Loaded] = {}  # replaced, never changed: a running call reads one state
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def load(self, name: str, source: str | os.PathLike[str] | Mapping[str, Any], replace: bool) -> None:
        """See `OnnxRunner.load`."""
        if not isinstance(name, str) or not name:
            raise SurgeryError(f"an adapter's name is a text, not {name!r}")
        if isinstance(source, Mapping):
            tensors = {key: np.array(value) for key, value in source.items()}
            if problems := self.manifest.check(tensors):
                raise listed(f"the adapter {name!r} can't be loaded", problems)
            values = {key: value_of(tensor) for key, tensor in tensors.items()}
        else:
            values = read_values(Path(source), self.manifest)
        slots, values = self.manifest.by_name, self._in_file_dtypes(dict(values))
        sites = frozenset([(slots[key].site, slots[key].rule) for key in values])
        loaded = _Loaded(name, values, sites)
        with self._lock:
            if name in self._adapters and not replace:
                fix = "another name; unload it first; or replace=True"
                raise SurgeryError(f"an adapter {name!r} is loaded already", fix=fix)
            self._adapters = {**self._adapters, name: loaded}

    def unload(self, name: str) -> None:
        """See `OnnxRunner.unload`."""
        with self._lock:
            self._get(name)
            self._adapters = {key: value for key, value in self._adapters.items() if key != name}

    def slot_values(self, adapter: Adapter) -> dict[str, Any]:
        """See `OnnxRunner.slot_values`."""
        names = [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
        chosen = [self._get(name) for name in names]
        for i, member in enumerate(chosen):
            for other in chosen[:i]:
                if member is other:
                    raise SurgeryError(f"the adapter {member.name!r} is named twice")
                if common := sorted(member.sites & other.sites):
                    where = ", ".join(site for site, _ in common[:3]) + (", …" if len(common) > 3 else "")
                    why = "a slot holds one adapter's tensors"
                    fix = "combine them into one adapter before it is exported: surgery.combine"
                    what = f"{other.name!r} and {member.name!r} can't be used together"
                    raise SurgeryError(what, where=where, why=why, fix=fix)
        values = dict(self._defaults)
        for member in chosen:
            values.update(member.values)
        if unknown := [name for name, value in values.items() if value is None]:
            why = f"the base's values of these slots are in {self.path.name}{DEFAULTS}, which is missing"
            raise SurgeryError("the slots need an adapter", where=", ".join(unknown[:3]), why=why)
        return values

    def empty_prompts(self) -> dict[str, Any]:
        """Returns empty virtual tokens, for calls whose cache already contains those of the first call."""
        prompts = [slot for slot in self.manifest.slots if slot.rule == "prompt"]
        arrays = {slot.name: np.zeros([size or 0 for size in slot.shape], dtype_of(slot.dtype)) for slot in prompts}
        return self._in_file_dtypes({name: value_of(array) for name, array in arrays.items()})

    def _get(self, name: str) -> _Loaded:
        adapter = self._adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            loaded = ", ".join(self._adapters) or "none"
            why = (near_misses(name, self._adapters) if isinstance(name, str) else None) or f"loaded: {loaded}"
            raise SurgeryError(f"there is no adapter {name!r}", why=why, fix="load it first: runner.load(name, file)")
        return adapter

    def _required_defaults(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns required slots' values without an adapter; None where they are unknown."""
        defaults = defaults_of(self.path, self.manifest) if names else {}
        return self._in_file_dtypes(
            {name: None if (array := defaults[name]) is None else value_of(array) for name in names}
        )

    def _in_file_dtypes(self, values: dict[str, Any]) -> dict[str, Any]:
        """Converts OrtValues of slots to this file's precision."""
        for name in self._converted_dtypes.keys() & values.keys():
            if values[name] is not None:
                array, dtype = array_of_value(values[name]), dtype_of(self._converted_dtypes[name])
                with np.errstate(over="ignore"):
                    converted = array.astype(dtype)
                if not np.isfinite(converted.astype(np.float64)).all():
                    why = f"the file was converted to {self._converted_dtypes[name]}, which can't hold them"
                    problem = SurgeryError("numbers are too large for the file", where=name, why=why)
                    raise listed(f"{self.path.name} can't take these tensors", [problem])
                values[name] = value_of(converted)
        return values
