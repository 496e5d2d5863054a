"""The declarations of which a format of adapter files consists, and the registry of formats. Needs no torch.

A format is data: how its keys are spelt, how tensors lie, where the scale stands, how modules are named, and which
files it has. `reading.py` and `writing.py` are the one engine for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import SurgeryError, near_misses

__all__ = [
    "AdapterFormat", "KINDS", "ModuleNames", "NameRow", "KeyPrefix", "TensorKey", "format_named", "formats",
    "register_format",
]  # fmt: skip


@dataclass(frozen=True)
class TensorKey:
    """One kind of tensor: its part of the change, what follows the module's name in its key, and its layout.

    `part`: the name in the intermediate form, such as "A" (rank, in) or "B" (out, rank). `layout`: the name of a
    conversion in `layouts.py`; "" where the numbers are the same. `embedding`: True for tensors of tables of embeddings
    alone, False for those of all other modules, None for both.
    """

    part: str
    ending: str
    layout: str = ""
    embedding: bool | None = False


@dataclass(frozen=True)
class KeyPrefix:
    """What stands before a module's name in a key, and the component of a pipeline that it means ("": one model).

    `names`: the module names that this prefix implies, by the name of a `ModuleNames`; "" if the names decide.
    `beside`: the prefix is written where the pipeline has this component too. `separator`: what stands between the
    names of a path after this prefix; "": the format's.
    """

    text: str
    component: str = ""
    names: str = ""
    beside: str = ""
    separator: str = ""


@dataclass(frozen=True)
class NameRow:
    """A module of another program, and the modules here that it is.

    `{n}` stands for a number, and `{rest}` for any further names. Several modules in `ours` are fused in `theirs`:
    their rows stand one after another, with sizes in the proportions `ratio` (default: equal). `rows`: the name of a
    permutation of the output's rows in `layouts.py`. `embedding`: the module is a table of embeddings, and its A lies
    transposed.
    """

    theirs: str
    ours: tuple[str, ...]
    ratio: tuple[int, ...] = ()
    rows: str = ""
    embedding: bool = False


@dataclass(frozen=True)
class ModuleNames:
    """How a program names the modules of one architecture.

    `marks`: regular expressions for names of theirs; a file with such a name has these module names. `own_marks`: the
    same for names of ours. `component`: the component that the architecture is. `partial`: modules without a row have
    the same name in both. `model_types`: values of `model_type` or `_class_name` in the base's configuration.
    `header_names`: how the file's header calls each of these types, where it names the architecture.
    """

    name: str
    rows: tuple[NameRow, ...]
    marks: tuple[str, ...]
    own_marks: tuple[str, ...]
    component: str = ""
    partial: bool = False
    model_types: tuple[str, ...] = ()
    header_names: tuple[str, ...] = ()


# What a change consists of: kind → (parts that are always there, parts that may be there).
KINDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "lora": (frozenset({"A", "B"}), frozenset({"mid", "alpha", "magnitude", "B_bias"})),
    "loha": (
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        frozenset({"hada_t1", "hada_t2", "alpha", "magnitude"}),
    ),
    "lokr": (
        frozenset(),
        frozenset(
            {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "magnitude"}
        ),
    ),
    "difference": (frozenset({"diff"}), frozenset({"diff_b", "alpha"})),
    "bias difference": (frozenset({"diff_b"}), frozenset({"alpha"})),
    "oft": (frozenset({"oft_blocks"}), frozenset({"rescale", "alpha"})),
    "glora": (frozenset({"a1", "a2", "b1", "b2"}), frozenset({"bm", "alpha"})),
    "norm difference": (frozenset({"w_norm"}), frozenset({"b_norm", "alpha"})),
    "value": (frozenset({"value"}), frozenset()),
}


@dataclass(frozen=True)
class AdapterFormat:
    """A format of adapter files.

    `name`: the word for `format=`. `title`: how texts call it. `files`: names of its tensor file in a folder; the first
    is written. `settings_file`: the name of its settings file, or None. `prefixes`, `keys`: what keys are made of.
    `separator`: what stands between the names of a module's path. `words`: names of modules that contain the separator.
    `names`: the `ModuleNames` that occur in it. `names_required`: all its modules have such names. `scale`: the name of
    a way to say the scale, in `scales.py`. `settings`: the settings file as a template; texts that begin with "$" are
    values. `header`: the same for the metadata of the tensors' file. `container`: "safetensors", "gguf" or
    "onnx_adapter". `contains`: formats whose files are valid files of this format with the same meaning. `notes`: what
    a person should know of written files.
    """

    name: str
    title: str
    keys: tuple[TensorKey, ...]
    files: tuple[str, ...]
    prefixes: tuple[KeyPrefix, ...] = (KeyPrefix(""),)
    settings_file: str | None = None
    separator: str = "."
    words: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    names_required: bool = False
    scale: str = "alpha_key"
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    container: str = "safetensors"
    contains: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_formats: dict[str, AdapterFormat] = {}


def register_format(adapter_format: AdapterFormat) -> AdapterFormat:
    """Adds a format to those that `load_adapter`, `save_adapter` and `convert_adapter` know."""
    other = _formats.get(adapter_format.name)
    if other is not None and other != adapter_format:
        raise SurgeryError(
            f"there is a format {adapter_format.name!r} already", why=other.title, fix="give it another name"
        )
    _formats[adapter_format.name] = adapter_format
    return adapter_format


def formats() -> Mapping[str, AdapterFormat]:
    """All registered formats by name, in the order of their registration."""
    return _formats


def format_named(name: str) -> AdapterFormat:
    if name not in _formats:
        known = ", ".join(_formats)
        raise SurgeryError(
            f"there is no format {name!r}", why=near_misses(name, _formats) or None, fix=f"one of {known}"
        )
    return _formats[name]
