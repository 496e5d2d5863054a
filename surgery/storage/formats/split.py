"""Splits the keys of a file into prefix, module and tensor, by a format. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.storage.formats.module_names import names_named
from surgery.storage.formats.path_codec import decode
from surgery.storage.formats.table import AdapterFormat, KeyPrefix, TensorKey

__all__ = ["split_keys"]

Split = dict[str, tuple[KeyPrefix, str, TensorKey]]


def split_keys(adapter_format: AdapterFormat, keys: Iterable[str]) -> tuple[Split, list[str]]:
    """The parts of each key, and the keys that the format does not have."""
    prefixes = sorted(adapter_format.prefixes, key=lambda prefix: -len(prefix.text))
    endings = sorted(adapter_format.keys, key=lambda key: -len(key.ending))
    split: Split = {}
    unknown: list[str] = []
    for key in keys:
        parts = _parts(adapter_format, key, prefixes, endings)
        if parts is None:
            unknown.append(key)
        else:
            split[key] = parts
    return split, unknown


def _parts(
    adapter_format: AdapterFormat, key: str, prefixes: list[KeyPrefix], endings: list[TensorKey]
) -> tuple[KeyPrefix, str, TensorKey] | None:
    for tensor_key in endings:
        if not key.endswith(tensor_key.ending):
            continue
        for prefix in prefixes:
            if not key.startswith(prefix.text):
                continue
            text = key[len(prefix.text) : len(key) - len(tensor_key.ending)]
            if text and _is_name(adapter_format, prefix, text):
                return prefix, text, tensor_key
    return None


def _is_name(adapter_format: AdapterFormat, prefix: KeyPrefix, text: str) -> bool:
    """Whether a text can be a module's name in this format."""
    separator = prefix.separator or adapter_format.separator
    if separator != ".":
        return "." not in text
    if not adapter_format.names_required:
        return True
    path = decode(text, separator, adapter_format.words)
    candidates = [prefix.names] if prefix.names else adapter_format.names
    return path is not None and any(names_named(name).ours(path) is not None for name in candidates)
