"""Writes the intermediate form as the tensors and settings of any registered format, or says why it can't."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.errors import SurgeryError, abbreviate
from surgery.storage.formats.base_facts import component_of
from surgery.storage.formats.contents import BaseFacts, Change, Contents
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.layouts import LAYOUTS, row_order
from surgery.storage.formats.module_names import IDENTITY, NameMap, Place, names_named
from surgery.storage.formats.path_codec import encode
from surgery.storage.formats.scale_values import Written, alpha_of
from surgery.storage.formats.scales import SCALES
from surgery.storage.formats.table import AdapterFormat, KeyPrefix, TensorKey

__all__ = ["FileContents", "file_contents"]


@dataclass
class FileContents:
    """What the files of an adapter contain: tensors, the settings file, and the header's metadata."""

    tensors: dict[str, FileTensor]
    settings: dict[str, Any] | None
    header: dict[str, Any]
    notes: list[str]


def file_contents(adapter_format: AdapterFormat, contents: Contents, base: BaseFacts | None = None) -> FileContents:
    """The files of an adapter in a format. `SurgeryError` if the format can't hold it; nothing is written then."""
    base, written = base or BaseFacts(), Written()
    if not any(contents.changes.values()):
        raise SurgeryError("the adapter has no tensors to write")
    changed = copy.copy(contents)
    changed.changes = {}
    placed: list[tuple[KeyPrefix, str, Place, Change]] = []
    for component, changes in contents.changes.items():
        names = _names(adapter_format, component, changes, base.of(component))
        prefix = _prefix(adapter_format, component, names, {*base.parts, *contents.changes})
        written.values["architecture"] = _architecture(names, base.of(component))
        for place, change in _fused(names, changes, written):
            placed.append((prefix, component, place, change))
            changed.changes.setdefault(component, {})["\n".join(place.ours)] = change
    _paths_again(changed)
    _check_settings(adapter_format, contents)
    SCALES[adapter_format.scale].write(changed, written)
    if "paths" in written.values:
        written.values["paths"] = [place.theirs for _, _, place, _ in placed]
    tensors: dict[str, FileTensor] = {}
    for prefix, component, place, change in placed:
        start = prefix.text + encode(place.theirs, prefix.separator or adapter_format.separator)
        for part, tensor in change.tensors.items():
            key = _key(adapter_format, part, change, place)
            tensors[start + key.ending] = _laid_out(tensor, part, key, place, base.of(component))
    settings = _filled(adapter_format.settings, written.values) if adapter_format.settings else written.settings
    header = {**_filled(adapter_format.header, written.values), **written.header}
    notes = [*written.notes, *adapter_format.notes]
    return FileContents(tensors, settings if adapter_format.settings_file else None, header, notes)


def _paths_again(contents: Contents) -> None:
    """A change of one module under its path; those of several keep all of them, for messages."""
    for component, changes in contents.changes.items():
        contents.changes[component] = {path.replace("\n", " + "): change for path, change in changes.items()}


def _check_settings(adapter_format: AdapterFormat, contents: Contents) -> None:
    if contents.settings.get("invocation") and adapter_format.scale not in ("peft", "diffusers", "one_alpha"):
        why = "its LoRA acts only after these tokens, and the format would make it act on all"
        fix = "choose another format: PEFT's files and GGUF hold them"
        raise SurgeryError(f"the format {adapter_format.name!r} has no place for invocation tokens", why=why, fix=fix)


_ELSEWHERE = "choose another format, such as peft; or leave these modules out of the adapter"


# Names --------------------------------------------------------------------------------------------------------


def _names(adapter_format: AdapterFormat, component: str, changes: Iterable[str], base: BaseFacts) -> NameMap:
    """The names that the format gives the modules of a component."""
    paths = list(changes)
    maps = [names_named(name) for name in adapter_format.names]
    maps = [each for each in maps if not component or each.names.component in (component, "")]
    kind = base.kind if component_of(base.kind) else ""  # other classes say nothing of an architecture
    types = _types(base) | ({kind} - {""})
    by_type = [each for each in maps if types & set(each.names.model_types)]
    untyped = [each for each in maps if not types or not each.names.model_types]
    fitting = by_type or [each for each in untyped if each.own_marked(paths) and each.covers(paths)]
    if len(fitting) > 1:
        kinds = " or ".join(each.names.name for each in fitting)
        raise SurgeryError(
            f"the modules may be those of {kinds}, which the format {adapter_format.name!r} names differently",
            where=paths[0],
            why="the paths are those of each of them",
            fix="give the base, whose configuration says what it is: base=",
        )
    if fitting:
        (names,) = fitting
        if missing := [path for path in paths if names.theirs(path) is None]:
            raise SurgeryError(
                f"the format {adapter_format.name!r} has no names for these modules of {names.names.name}",
                where=abbreviate(missing),
                why="its program has no adapters on such modules, or calls them in a way that is not known here",
                fix=_ELSEWHERE,
            )
        return names
    if adapter_format.names_required:
        known = ", ".join(adapter_format.names)
        why = f"it holds adapters of {known}, and the modules are not named like those"
        raise SurgeryError(
            f"the format {adapter_format.name!r} has no names for these modules",
            where=paths[0],
            why=why,
            fix=_ELSEWHERE,
        )
    return IDENTITY


def _types(base: BaseFacts) -> set[Any]:
    """What the base's configuration calls its model, and that of its text."""
    inner = base.config.get("text_config")
    types = {base.config.get("model_type"), base.config.get("_class_name")}
    return (types | ({inner.get("model_type")} if isinstance(inner, Mapping) else set())) - {None, ""}


def _architecture(names: NameMap, base: BaseFacts) -> str:
    """How the header of a file calls the base's architecture; "" where no header does."""
    pairs = zip(names.names.model_types, names.names.header_names, strict=False)
    return next((header for kind, header in pairs if kind in _types(base)), "")


def _prefix(adapter_format: AdapterFormat, component: str, names: NameMap, pipeline: set[str]) -> KeyPrefix:
    there = [prefix for prefix in adapter_format.prefixes if prefix.names in ("", names.names.name)]
    there = [prefix for prefix in there if not prefix.beside or prefix.beside in pipeline]
    exact = sorted((prefix for prefix in there if prefix.component == component), key=lambda each: not each.beside)
    by_names = [prefix for prefix in there if component and component == names.names.component]
    if exact or by_names:
        return (exact or by_names)[0]
    plain = [prefix for prefix in there if prefix.component == ""]
    if plain and not any(prefix.component for prefix in there):
        return plain[0]
    known = ", ".join(dict.fromkeys(prefix.component for prefix in there if prefix.component))
    what = f"has no component {component!r}" if component else "writes the component of a pipeline before each name"
    raise SurgeryError(
        f"the format {adapter_format.name!r} {what}",
        why="its files name a component of a pipeline before each module",
        fix=f"component= says which the adapter is of: {known}",
    )


# Fused modules ------------------------------------------------------------------------------------------------


def _fused(names: NameMap, changes: Mapping[str, Change], written: Written) -> Iterable[tuple[Place, Change]]:
    groups: dict[str, tuple[Place, dict[int, Change]]] = {}
    for path, change in changes.items():
        place = names.theirs(path)
        assert place is not None
        groups.setdefault(place.theirs, (place, {}))[1][place.index] = change
    for place, parts in groups.values():
        if len(place.ours) == 1:
            (change,) = parts.values()
            yield place, Change(change.kind, dict(change.tensors), change.scale, change.rank, change.embedding)
        else:
            yield place, _join(place, parts, written)


def _join(place: Place, parts: Mapping[int, Change], written: Written) -> Change:
    """One change for several modules: B's rows one after another. Equal A are one, others stand one after another."""
    first = next(iter(parts.values()))
    ratio = place.row.ratio or (1,) * len(place.ours)
    where = " and ".join(place.ours)
    if any(change.kind != "lora" or set(change.tensors) != {"A", "B"} for change in parts.values()):
        what = "only plain LoRA can be written for modules that the format fuses"
        why = "the change of the fused module is not one of the method's own"
        raise SurgeryError(what, where=where, why=why, fix="as_lora(model) makes plain LoRA of it, or another format")
    index = next(iter(parts))
    unit, rest = divmod(first.tensors["B"].shape[0], ratio[index])
    sizes = [share * unit for share in ratio]
    if rest or any(change.tensors["B"].shape[0] != sizes[i] for i, change in parts.items()):
        shapes = ", ".join(str(change.tensors["B"].shape) for change in parts.values())
        raise SurgeryError(
            "the modules that the format fuses have other sizes",
            where=where,
            why=f"B is {shapes}, not in {ratio}",
            fix=_ELSEWHERE,
        )
    if missing := [place.ours[i] for i in range(len(ratio)) if i not in parts]:
        written.notes.append(f"{place.theirs} also stands for {', '.join(missing)}, whose change is written as zeros")
    values = {i: change.tensors["A"].read() for i, change in parts.items()}
    B = {i: change.tensors["B"].read() for i, change in parts.items()}
    one = all(torch.equal(A, values[index]) for A in values.values()) and not missing
    if one and len({change.scale for change in parts.values()}) == 1:
        joined = torch.cat([B[i] for i in range(len(ratio))])
        tensors = {"A": FileTensor.of(values[index], first.key), "B": FileTensor.of(joined, first.key)}
        return Change("lora", tensors, first.scale, first.rank)
    ranks = {change.rank for change in parts.values()}
    width = ranks.pop()
    if ranks or len({change.scale for change in parts.values()}) > 1:
        why = "one tensor A and one scale stand for all of them"
        raise SurgeryError(
            "the modules that the format fuses have other ranks or scales", where=where, why=why, fix=_ELSEWHERE
        )
    rank = width * len(ratio)
    A = values[index].new_zeros((rank, *values[index].shape[1:]))
    whole = B[index].new_zeros((sum(sizes), rank, *B[index].shape[2:]))
    start = 0
    for i, size in enumerate(sizes):
        if i in parts:
            A[i * width : (i + 1) * width] = values[i]
            whole[start : start + size, i * width : (i + 1) * width] = B[i]
        start += size
    alpha = alpha_of(first.scale, rank)  # of the rank that the file has, by which its readers divide
    return Change("lora", {"A": FileTensor.of(A, first.key), "B": FileTensor.of(whole, first.key)}, alpha / rank, rank)


# Tensors ------------------------------------------------------------------------------------------------------


def _key(adapter_format: AdapterFormat, part: str, change: Change, place: Place) -> TensorKey:
    keys = [key for key in adapter_format.keys if key.part == part]
    table = change.embedding and not place.row.embedding  # a row for a table says where its tensors go
    fitting = [key for key in keys if key.embedding in (table, None)]
    if keys and not fitting and table and part in ("A", "B"):
        raise SurgeryError(
            f"the format {adapter_format.name!r} can't hold the adapter",
            where=" + ".join(place.ours),
            why="it has no place for a change of a table of embeddings, and programs would ignore or misread it",
            fix="leave the table out of the adapter, merge it, or choose another format, such as 'peft'",
        )
    keys = fitting or [key for key in keys if not key.embedding]
    if not keys:
        raise SurgeryError(
            f"the format {adapter_format.name!r} can't hold the adapter",
            where=" + ".join(place.ours),
            why=f"it has no place for the tensor {part!r} of a {change.kind}",
            fix="choose another format: PEFT's files or this library's hold more",
        )
    return keys[0]


def _laid_out(tensor: FileTensor, part: str, key: TensorKey, place: Place, base: BaseFacts) -> FileTensor:
    if place.row.rows and part in ("B", "B_bias", "magnitude", "diff", "diff_b"):
        try:
            order = torch.argsort(row_order(place.row.rows, base.config, tensor.shape[0]))
        except SurgeryError as error:
            error.where = error.where or " + ".join(place.ours)
            raise
        tensor = FileTensor(tensor.shape, tensor.dtype, lambda inner=tensor: inner.read()[order], tensor.key)
    layout = "transposed" if place.row.embedding and part == "A" else key.layout
    return tensor.convert(LAYOUTS[layout].write) if layout else tensor


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with values in the place of texts that begin with "$"."""
    if isinstance(template, Mapping):
        return {name: _filled(value, values) for name, value in template.items()}
    if isinstance(template, str) and template.startswith("$"):
        return values[template[1:]]
    return template
