"""Reads the tensors of any registered format into the intermediate form. No key is dropped or guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError, abbreviate
from surgery.storage.formats.contents import BaseFacts, Change, Contents
from surgery.storage.formats.file_tensor import FileTensor, tensor_of
from surgery.storage.formats.layouts import LAYOUTS, row_order
from surgery.storage.formats.module_names import IDENTITY, NameMap, Place, names_for_header, names_named, names_of_file
from surgery.storage.formats.path_codec import decode, encode
from surgery.storage.formats.scales import SCALES
from surgery.storage.formats.split import split_keys
from surgery.storage.formats.table import KINDS, AdapterFormat, KeyPrefix, TensorKey

__all__ = ["read_contents"]

# Names of tables of embeddings, where no model says which modules are such.
EMBEDDINGS = frozenset("embed_tokens wte word_embeddings tok_embeddings embed_in shared token_embedding".split())


class _Module(NamedTuple):
    """A module of the file: its prefix, its name in keys, and its tensors by part."""

    prefix: KeyPrefix
    text: str
    parts: dict[str, tuple[TensorKey, str]]


def read_contents(
    adapter_format: AdapterFormat, file: TensorFile, settings: Any = None, base: BaseFacts | None = None
) -> Contents:
    """The adapter in a file of a format. `SurgeryError` names the keys that do not fit the format.

    `settings`: the content of the settings file. `base`: what is known of the model.
    """
    try:
        return _read(adapter_format, file, settings, base or BaseFacts())
    except SurgeryError:
        raise
    except Exception as error:  # fields of a file may have any type
        why = f"{type(error).__name__}: {error}"[:300]
        raise SurgeryError(f"the file can't be read in the format {adapter_format.name!r}", why=why) from error


def _read(adapter_format: AdapterFormat, file: TensorFile, settings: Any, base: BaseFacts) -> Contents:
    contents = Contents()
    by_prefix = _modules(adapter_format, file)
    for prefix, modules in by_prefix.items():
        texts = [module.text for module in modules]
        places, component = _places(adapter_format, prefix, texts, base, file.metadata)
        changes = contents.changes.setdefault(component, {})
        for module, place in zip(modules, places, strict=True):
            kind = _kind(module)
            for path, change in _changes(module, kind, place, file, base.of(component), contents):
                if path in changes:
                    keys = abbreviate([changes[path].key, change.key])
                    raise SurgeryError("two modules of the file are one module here", where=keys, why=f"it is {path}")
                changes[path] = change
    SCALES[adapter_format.scale].read(contents, settings, file.metadata)
    _share_scales(contents)
    return contents


def _modules(adapter_format: AdapterFormat, file: TensorFile) -> dict[KeyPrefix, list[_Module]]:
    split, unknown = split_keys(adapter_format, file.shapes)
    if unknown:
        count = "one key has" if len(unknown) == 1 else f"{len(unknown)} keys have"
        raise SurgeryError(
            f"{count} no place in the format {adapter_format.name!r}",
            where=abbreviate([key[:200] for key in unknown], "keys"),
            why="no tensor of a file is passed over",
            fix="format= names another format, if the file is of another program",
        )
    modules: dict[KeyPrefix, dict[str, _Module]] = {}
    for key, (prefix, text, tensor_key) in split.items():
        module = modules.setdefault(prefix, {}).setdefault(text, _Module(prefix, text, {}))
        if tensor_key.part in module.parts:
            where = abbreviate([module.parts[tensor_key.part][1], key])
            raise SurgeryError("two tensors of the file have one meaning", where=where)
        module.parts[tensor_key.part] = tensor_key, key
    return {prefix: list(inner.values()) for prefix, inner in modules.items()}


def _kind(module: _Module) -> str:
    parts = frozenset(module.parts)
    keys = [key for _, key in module.parts.values()]
    for kind, (required, optional) in KINDS.items():
        if required <= parts <= required | optional and (kind != "lokr" or _whole_lokr(parts)):
            return kind
    near = max(KINDS, key=lambda kind: (len(KINDS[kind][0] & parts), -len(parts - KINDS[kind][0] - KINDS[kind][1])))
    missing = sorted(KINDS[near][0] - parts)
    extra = sorted(parts - KINDS[near][0] - KINDS[near][1])
    why = f"the tensor {', '.join(missing)} is missing" if missing else f"{', '.join(extra)} does not belong to it"
    raise SurgeryError(f"the tensors of {module.text} are not a whole {near}", where=abbreviate(keys, "keys"), why=why)


def _whole_lokr(parts: frozenset[str]) -> bool:
    """Each factor is there once: whole, or as a product."""
    first = ("lokr_w1" in parts) + ({"lokr_w1_a", "lokr_w1_b"} <= parts)
    second = ("lokr_w2" in parts) + ({"lokr_w2_a", "lokr_w2_b"} <= parts)
    pairs = all((f"{name}_a" in parts) == (f"{name}_b" in parts) for name in ("lokr_w1", "lokr_w2"))
    return first == 1 and second == 1 and pairs


# Paths --------------------------------------------------------------------------------------------------------


def _places(
    adapter_format: AdapterFormat, prefix: KeyPrefix, texts: list[str], base: BaseFacts, header: Mapping[str, Any]
) -> tuple[list[Place], str]:
    """The modules here for the modules of the file under one prefix, and their component."""
    separator = prefix.separator or adapter_format.separator
    candidates = [prefix.names] if prefix.names else names_for_header(adapter_format.names, header)
    decoded = {text: decode(text, separator, adapter_format.words) for text in texts} if separator == "." else {}
    start = {text: decoded.get(text) or text.replace(separator, ".") for text in texts}
    names = names_of_file(start.values(), candidates) if not prefix.names else names_named(prefix.names)
    component = names.names.component or prefix.component
    part = base.of(component)
    known = _by_text(names, part, separator) if separator != "." and part.paths is not None else {}
    places, unknown = list[Place](), list[str]()
    for text in texts:
        place = known.get(text)
        if place is None:
            path = decode(text, separator, adapter_format.words)
            place = names.ours(path) if path is not None else None
        if place is None:
            unknown.append(prefix.text + text)
        else:
            places.append(place)
    if unknown:
        which = f"names of {names.names.name}" if names is not IDENTITY else "known here"
        count = "one name of a module is" if len(unknown) == 1 else f"{len(unknown)} names of modules are"
        raise SurgeryError(
            f"{count} not {which}",
            where=abbreviate([name[:200] for name in unknown], "names"),
            why=f"the format writes a module's path with {separator!r}" if separator != "." else None,
            fix="base= gives the model whose modules have these names",
        )
    return places, component


def _by_text(names: NameMap, base: BaseFacts, separator: str) -> dict[str, Place]:
    """The model's modules by their name in keys; names that two modules have are left out."""
    known: dict[str, Place | None] = {}
    for path in base.paths or ():
        if (place := names.theirs(path)) is not None:
            text = encode(place.theirs, separator)
            other = known.get(text, place)
            known[text] = place if other is not None and other.ours == place.ours else None
    return {text: place for text, place in known.items() if place is not None}


# Tensors ------------------------------------------------------------------------------------------------------


def _changes(
    module: _Module, kind: str, place: Place, file: TensorFile, base: BaseFacts, contents: Contents
) -> Iterable[tuple[str, Change]]:
    tensors: dict[str, FileTensor] = {}
    first = place.ours[0]
    embedding = place.row.embedding or any(key.embedding for key, _ in module.parts.values())
    if not embedding and kind == "lora":
        embedding = _is_embedding(first, base, contents)
    for part, (tensor_key, key) in module.parts.items():
        tensor = tensor_of(file, key)
        layout = "transposed" if place.row.embedding and part == "A" else tensor_key.layout
        try:
            tensors[part] = tensor.convert(LAYOUTS[layout].read) if layout else tensor
        except SurgeryError as error:
            error.where = error.where or key
            raise
    change = Change(kind, tensors, rank=_rank(kind, tensors), embedding=embedding)
    _check_shapes(change)
    if place.row.rows:
        for part in ("B", "B_bias", "magnitude", "diff", "diff_b"):
            if part in tensors:
                tensors[part] = _reordered(tensors[part], place.row.rows, base)
    if len(place.ours) == 1:
        yield first, change
    else:
        yield from _unfused(change, place)


def _reordered(tensor: FileTensor, rows: str, base: BaseFacts) -> FileTensor:
    try:
        order = row_order(rows, base.config, tensor.shape[0])
    except SurgeryError as error:
        error.where = error.where or tensor.key
        raise
    return FileTensor(tensor.shape, tensor.dtype, lambda: tensor.read()[order], tensor.key)


def _is_embedding(path: str, base: BaseFacts, contents: Contents) -> bool:
    if base.is_embedding is not None and base.paths is not None and path in base.paths:
        return base.is_embedding(path)
    if path.rpartition(".")[2] not in EMBEDDINGS:
        return False
    contents.assumed.append(f"{path} is taken to be a table of embeddings, by its name")
    return True


def _rank(kind: str, tensors: Mapping[str, FileTensor]) -> int:
    name = {"lora": ("A",), "loha": ("hada_w1_b",), "glora": ("a2",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
    there = next((tensors[each] for each in name if each in tensors), None)
    return there.shape[0] if there is not None and there.shape else 0


# Numbers of axes of a part's tensor; those that are not named have two.
_AXES = {
    **dict.fromkeys(("A", "B", "diff", "lokr_w2"), range(2, 6)),
    **dict.fromkeys(("mid", "hada_t1", "hada_t2", "lokr_t2"), range(3, 6)),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), range(2, 6)),
    **dict.fromkeys(("magnitude", "B_bias", "diff_b", "w_norm", "b_norm", "value"), range(1, 2)),
    **dict.fromkeys(("alpha", "rescale"), range(6)),
    "oft_blocks": range(3, 5),
}


def _check_shapes(change: Change) -> None:
    tensors = change.tensors
    for part, tensor in tensors.items():
        if len(tensor.shape) not in _AXES.get(part, (2,)) or 0 in tensor.shape:
            what = f"the tensor {part!r} of a {change.kind} has another number of axes"
            raise SurgeryError(what, where=tensor.key, why=f"its shape is {tensor.shape}")
    if change.kind != "lora":
        return
    A, B = tensors["A"], tensors["B"]
    if len(B.shape) != len(A.shape) or B.shape[1] != A.shape[0]:
        raise SurgeryError(
            "the two halves of a LoRA differ in rank",
            where=f"{A.key} and {B.key}",
            why=f"in PEFT's layout A is {A.shape}, (rank, in), and B is {B.shape}, (out, rank)",
        )
    magnitude = tensors.get("magnitude")
    if magnitude is not None and magnitude.shape != (B.shape[0],):
        raise SurgeryError(
            "a magnitude of DoRA does not have a number for each output",
            where=magnitude.key,
            why=f"it has {magnitude.shape[0]} numbers, and the module {B.shape[0]} outputs",
        )


def _unfused(change: Change, place: Place) -> Iterable[tuple[str, Change]]:
    """The parts of a fused module: each has its rows of B, and the same A, or its own part of the rank."""
    if change.kind != "lora" or "magnitude" in change.tensors:
        what = "DoRA" if change.kind == "lora" else change.kind
        raise SurgeryError(
            f"{what} of fused modules is not a change of the single ones", where=change.key, why=" ".join(place.ours)
        )
    A, B = change.tensors["A"], change.tensors["B"]
    ratio = place.row.ratio or (1,) * len(place.ours)
    if B.shape[0] % sum(ratio):
        why = f"its {B.shape[0]} rows are not {len(ratio)} parts in the proportions {ratio}"
        raise SurgeryError("a fused module can't be split", where=B.key, why=why)
    unit, start = B.shape[0] // sum(ratio), 0
    spans = []
    for share in ratio:
        spans.append((start, start + share * unit))
        start += share * unit
    own = _own_ranks(B, spans, change.rank)
    alpha = {"alpha": change.tensors["alpha"]} if "alpha" in change.tensors else {}
    for index, (path, (first, end)) in enumerate(zip(place.ours, spans, strict=True)):
        low, high = own[index]
        whole = (low, high) == (0, change.rank)
        part_A = A if whole else A.convert(lambda t, low=low, high=high: t[low:high])
        part_B = B.convert(lambda t, a=first, b=end, low=low, high=high: t[a:b, low:high].contiguous())
        tensors = {"A": part_A, "B": part_B, **alpha}
        if "B_bias" in change.tensors:
            tensors["B_bias"] = change.tensors["B_bias"].convert(lambda t, a=first, b=end: t[a:b])
        # the scale is that of the whole rank: see `_share_scales`
        yield path, Change("lora", tensors, rank=change.rank)


def _own_ranks(B: FileTensor, spans: list[tuple[int, int]], rank: int) -> list[tuple[int, int]]:
    """Which part of the rank each part of the output uses: an equal part if B is block-diagonal, else all of it."""
    count = len(spans)
    if rank % count or not B.shape:
        return [(0, rank)] * count
    width, values = rank // count, B.read()
    for index, (first, end) in enumerate(spans):
        rows = values[first:end]
        if bool(torch.any(rows[:, : index * width] != 0)) or bool(torch.any(rows[:, (index + 1) * width :] != 0)):
            return [(0, rank)] * count
    return [(index * width, (index + 1) * width) for index in range(count)]


def _share_scales(contents: Contents) -> None:
    """Gives parts of fused modules their own rank; the scale came from the rank of the whole."""
    for _, _, change in contents.each():
        if change.kind == "lora":
            change.rank = change.tensors["A"].shape[0]
