"""Reads and checks the manifest of an exported file: its slots, inputs, outputs and base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError
from surgery.onnx.runtime.adapter_check import problems_of
from surgery.onnx.runtime.dtypes import NAMES, dtype_of
from surgery.onnx.runtime.metadata import metadata_of
from surgery.onnx.runtime.slot import Slot

__all__ = ["FORMAT", "HALF", "KEY", "SIDECAR", "Manifest", "read_manifest"]

FORMAT, VERSION = "model-surgery/onnx", 1
KEY = "surgery.manifest"  # the key in the metadata of the ONNX file
SIDECAR = ".manifest.json"
HALF = "half"  # whether the file has float16 weights: see `create_session`
_MOST = 64 << 20  # bytes of a sidecar
_DEFAULTS = ("empty", "zeros", "ones", "base")
# The fields and their types.
_FIELDS = {
    "adapters": str, "slots_as": str, "empty": str, "slot": str, "slots": list, "sites": list, "rules": list,
    "base": dict, "opset": int, "inputs": list, "outputs": list, "cache": list,
    "free": dict, "constants": dict, "versions": dict,
}  # fmt: skip
_OPTIONAL_FIELDS = ("free", "constants", "versions", "cache")
_CHOICES = {
    "adapters": ("slots", "constant", "merged"), "slots_as": ("overridable", "inputs"), "empty": ("rank0", "zeros1"),
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The description that an exported file contains of itself; `Manifest.read` reads it.

    >>> from surgery.onnx import Manifest
    >>> plain = {"format": "model-surgery/onnx", "version": 1, "adapters": "merged", "slots_as": "overridable"}
    >>> plain |= {"empty": "rank0", "slot": "slot", "slots": [], "sites": [], "rules": [], "base": {}, "opset": 20}
    >>> Manifest.of({**plain, "inputs": ["x"], "outputs": ["y"], "cache": []}).outputs
    ('y',)

    Attributes:
        adapters: "merged", "constant" or "slots".
        slots_as: "overridable" or "inputs".
        empty: "rank0" or "zeros1".
        slot: the slots' name.
        slots: the slots.
        sites: mappings with `site`, `rule`, `module` and `slots`: names of the tensors that an adapter supplies
            together.
        rules: the slots' rules, as data.
        base: the base's fingerprint.
        opset: version of the operators.
        inputs: names of the inputs.
        outputs: names of the outputs.
        cache: which output (`present`) is the next call's input (`past`).
        free: input → axis of any size → name.
        constants: adapters that are constants of the file.
        versions: versions of the programs that wrote the file.
        further: other fields of the data.
    """

    adapters: Literal["slots", "constant", "merged"]
    slots_as: Literal["overridable", "inputs"]
    empty: Literal["rank0", "zeros1"]
    slot: str
    slots: tuple[Slot, ...]
    sites: tuple[Mapping[str, Any], ...]
    rules: tuple[Any, ...]
    base: Mapping[str, Any]
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[Mapping[str, str], ...] = ()
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)

    # Reading and writing --------------------------------------------------------------------------------------

    @classmethod
    def read(cls, source: Any) -> Manifest:
        """The manifest of an ONNX file (its weights are not read), of a sidecar, or of an onnxruntime session.

        Raises:
            SurgeryError: there is no manifest, or it is not valid.
        """
        if not isinstance(source, (str, Path)) and hasattr(source, "get_modelmeta"):
            return cls._of_metadata(source.get_modelmeta().custom_metadata_map, "the session's file")
        path = Path(source)
        if path.name.endswith(".json"):
            try:
                if path.stat().st_size > _MOST:
                    raise SurgeryError(f"{path.name} is too large", why=f"{path.stat().st_size} bytes")
                return cls.from_json(path.read_bytes(), path.name)
            except OSError as error:
                raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None
        return cls._of_metadata(metadata_of(path), path.name)

    @classmethod
    def _of_metadata(cls, metadata: Mapping[str, str], where: str) -> Manifest:
        if KEY not in metadata:
            why, fix = (
                "export_onnx did not write it, or a program that changed it dropped the manifest",
                "export it again",
            )
            raise SurgeryError(f"{where} has no manifest", why=why, fix=fix)
        return cls.from_json(metadata[KEY], f"the manifest of {where}")

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the manifest") -> Manifest:
        """The manifest in a JSON text, which is checked; `SurgeryError` lists what is wrong."""
        return cls.of(parse_json(text, where), where)

    @classmethod
    def of(cls, data: Any, where: str = "the manifest") -> Manifest:
        """From plain data; see `from_json`."""
        wrong: list[str] = []
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise SurgeryError(f"{where} is not a manifest", why=f"its format is not {FORMAT!r}")
        if type(data.get("version")) is int and data["version"] > VERSION:
            why = f"it has version {data['version']}, and this release reads versions up to {VERSION}"
            raise SurgeryError(f"{where} was written by a later release", why=why, fix="update model-surgery")
        fields_of_data = {
            name: data[name] for name in _FIELDS if name in data or name not in _OPTIONAL_FIELDS and wrong.append(name)
        }
        if wrong:
            raise SurgeryError(f"{where} is damaged", why=f"it lacks {', '.join(wrong)}")
        wrong += [
            f"{name} is {_shorten(fields_of_data[name])}"
            for name in fields_of_data
            if type(fields_of_data[name]) is not _FIELDS[name]
        ]
        wrong += [
            f"{name}={_shorten(fields_of_data[name])} is not one of {', '.join(options)}"
            for name, options in _CHOICES.items()
            if fields_of_data[name] not in options
        ]
        if not wrong:
            fields_of_data["slots"] = tuple(_slot(slot, i, wrong) for i, slot in enumerate(fields_of_data["slots"]))
            fields_of_data |= {name: _texts(fields_of_data[name], name, wrong) for name in ("inputs", "outputs")}
            fields_of_data["cache"] = _cache(fields_of_data.get("cache", []), wrong)
            fields_of_data["free"] = _free(fields_of_data.get("free", {}), wrong)
            fields_of_data["sites"], fields_of_data["rules"] = (
                tuple(fields_of_data["sites"]),
                tuple(fields_of_data["rules"]),
            )
            _check_sites(fields_of_data["sites"], [slot for slot in fields_of_data["slots"] if slot is not None], wrong)
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise SurgeryError(f"{where} is damaged", why="; ".join(wrong[:8]) + more)
        known = {"format", "version", *_FIELDS}
        return cls(**fields_of_data, further={name: value for name, value in data.items() if name not in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `Manifest.of` makes an equal one."""
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **self.further}
        data |= {name: _json_value(getattr(self, name)) for name in _FIELDS}
        data["slots"] = [
            {field.name: _json_value(getattr(slot, field.name)) for field in fields(Slot)} for slot in self.slots
        ]
        return data

    def to_json(self) -> str:
        """As text, which `Manifest.from_json` reads."""
        return json.dumps(self.to_dict(), sort_keys=True)

    # Slots --------------------------------------------------------------------------------------

    @cached_property
    def by_name(self) -> Mapping[str, Slot]:
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def groups(self) -> Mapping[tuple[str, str], tuple[Slot, ...]]:
        """The slots of each rule at each site, which an adapter brings all or none of: by (site, rule)."""
        return {
            (site["site"], site["rule"]): tuple(self.by_name[name] for name in site["slots"])
            for site in self.sites
            if site["slots"]
        }

    @cached_property
    def digest(self) -> bytes:
        """Of the base and the slots' names, shapes and types: files of one digest take the same adapters."""
        slots = sorted((slot.name, slot.shape, slot.dtype) for slot in self.slots)
        return hashlib.sha256(json.dumps([_json_value(self.base), slots], sort_keys=True).encode()).digest()

    def default(self, slot: Slot) -> np.ndarray | None:
        """What a slot holds without an adapter; None for the base's own numbers, which the file has."""
        if slot.default == "base":
            return None
        empty_size = 0 if self.empty == "rank0" else 1
        shape = [empty_size if size is None else size for size in slot.shape]
        return (np.ones if slot.default == "ones" else np.zeros)(shape, dtype_of(slot.dtype))

    def check(self, tensors: Mapping[str, np.ndarray], *, finite: bool = False) -> list[SurgeryError]:
        """All that keeps an adapter's tensors from being this file's: one error each, none where they fit.

        `finite`: that all their numbers are is known, and not looked at.
        """
        if not self.slots:
            why = f'it was exported with adapters="{self.adapters}"'
            return [SurgeryError("the file has no slots for adapters", why=why, fix='export_onnx(…, adapters="slots")')]
        return problems_of(self.by_name, tensors, empty=self.empty, finite=finite)


def read_manifest(source: Any) -> Manifest:
    """`Manifest.read`."""
    return Manifest.read(source)


# Checks of untrusted data -----------------------------------------------------------------------------------------


def _slot(data: Any, index: int, wrong: list[str]) -> Slot | None:
    kinds = {"name": str, "site": str, "module": str, "rule": str, "tensor": str, "dtype": str, "default": str}
    if not isinstance(data, Mapping) or any(type(data.get(name)) is not kind for name, kind in kinds.items()):
        return wrong.append(f"slot {index} is {_shorten(data)}")
    where = f"the slot {data['name'][:100]!r}"
    shape, free, dim = data.get("shape"), data.get("free"), data.get("dim")
    if type(shape) is not list or not all(size is None or type(size) is int and 0 <= size < 1 << 40 for size in shape):
        return wrong.append(f"{where} has the shape {_shorten(shape)}")
    if type(free) is not list or free != [axis for axis, size in enumerate(shape) if size is None] or len(free) > 1:
        return wrong.append(f"{where} has the free axes {_shorten(free)} of {shape}")
    if type(dim) is not (str if free else type(None)) or data["dtype"] not in NAMES:
        return wrong.append(f"{where} has dim={_shorten(dim)}, dtype={_shorten(data['dtype'])}")
    if data["default"] not in _DEFAULTS or (data["default"] == "empty") != bool(free):
        return wrong.append(f"{where} is {data['default'][:40]!r} by default")
    return Slot(shape=tuple(shape), free=tuple(free), dim=dim, **{name: data[name] for name in kinds})


def _check_sites(sites: tuple[Any, ...], slots: list[Slot], wrong: list[str]) -> None:
    """Checks that each slot is listed at exactly one site, which is the slot's own."""
    unlisted = {slot.name: slot for slot in slots}
    if len(unlisted) != len(slots):
        wrong.append("two slots have the same name")
    seen: set[tuple[str, str]] = set()
    for site in sites:
        valid = isinstance(site, Mapping) and all(type(site.get(name)) is str for name in ("site", "rule", "module"))
        if not valid or type(site.get("slots")) is not list or (site["site"], site["rule"]) in seen:
            wrong.append(f"a site is {_shorten(site)}")
            continue
        seen.add((site["site"], site["rule"]))
        for name in site["slots"]:
            slot = unlisted.pop(name, None) if isinstance(name, str) else None
            if slot is None or (slot.site, slot.rule) != (site["site"], site["rule"]):
                wrong.append(
                    f"the site {site['site'][:100]!r} has the slot {_shorten(name)}, which is not a slot of this site"
                )
    wrong += [f"the slot {name[:100]!r} is at no site" for name in unlisted]


def _texts(data: Any, name: str, wrong: list[str]) -> tuple[str, ...]:
    if not all(isinstance(text, str) for text in data):
        wrong.append(f"{name} are {_shorten(data)}")
    return tuple(data)


def _cache(data: Any, wrong: list[str]) -> tuple[Mapping[str, str], ...]:
    for entry in data:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(name), str) for name in ("past", "present")):
            wrong.append(f"the cache has {_shorten(entry)}")
    return tuple(data)


def _free(data: Any, wrong: list[str]) -> dict[str, dict[int, str]]:
    free: dict[str, dict[int, str]] = {}
    for name, axes in data.items():
        if not isinstance(axes, Mapping) or not all(str(axis).isdecimal() for axis in axes):
            wrong.append(f"the input {str(name)[:100]!r} has the free axes {_shorten(axes)}")
            continue
        free[name] = {int(axis): dim for axis, dim in axes.items()}
    return free


def _shorten(value: Any) -> str:
    return f"{value!r}"[:120]


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, (list, tuple)) else value
