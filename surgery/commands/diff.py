"""`surgery diff`: what differs between two adapters, or between two models, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.adapter_files.entry import SURGERY, names_in
from surgery.adapter_files.tensor_headers import read_header
from surgery.commands.adapter_description import describe_adapter, our_place, peft_keys, peft_place
from surgery.commands.answer import Answer, Table
from surgery.commands.paths import existing
from surgery.commands.tensor_comparison import Place, compare_tensors, norm_of
from surgery.commands.weight_changes import changes_of, compare_changes
from surgery.commands.weight_files import weight_files
from surgery.errors import SurgeryError
from surgery.results import plain

__all__ = ["diff"]

MOST = 20  # rows of the table, without --all


def diff(
    a: Annotated[Path, typer.Argument(metavar="FIRST", help="An adapter or a model: a folder or a safetensors file.")],
    b: Annotated[Path, typer.Argument(metavar="SECOND", help="The other one.")],
    all: Annotated[
        bool, typer.Option("--all", help=f"List all tensors that differ; default: the first {MOST}.")
    ] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="The exit code is 1 if anything differs, and 2 for an error.")
    ] = False,
) -> Answer:
    """Compare two adapters or two models: settings, tensors, and the norm of each difference.

    Tensors are read piece by piece, so models larger than memory work. Equal tensors are counted and not listed.

    The relative difference is |second - first| / |first|.

    Of two adapters, the change of each weight is compared, too. For LoRA it is scale · B A.

        surgery diff adapters/monday adapters/tuesday
    """
    from surgery.progress import each_step

    first, second = _tensors(existing(a)), _tensors(existing(b))
    if a.is_dir() and b.is_dir() and bool(names_in(a)) != bool(names_in(b)):
        adapter, other = (a, b) if names_in(a) else (b, a)
        what, fix = f"{adapter} is an adapter, and {other} is not", "compare two adapters, or two models"
        raise SurgeryError(what, fix=fix)
    settings = _setting_differences(a, b)
    rows: list[dict[str, Any]] = []
    names = list(dict.fromkeys([*first, *second]))
    with each_step(names, True, "compare") as steps:
        for name in steps:
            rows.append(_compare(name, first.get(name), second.get(name)))
    counts = Counter(row["status"] for row in rows)
    differing = [row for row in rows if row["status"] != "equal"]
    differing.sort(key=lambda row: -(row["relative"] if row["relative"] is not None else float("inf")))
    equal = not differing and not settings
    data = {"a": str(a), "b": str(b), "equal": equal, "settings": settings, "counts": dict(counts), "tensors": rows}
    changes, notes = _changes(a, b)
    data |= {"changes": changes, "notes": notes}
    head = f"{len(rows):,} tensors: " + (", ".join(f"{count:,} {status}" for status, count in counts.items()) or "none")
    parts: list[str | Table] = [head]
    parts += [f"  {name}: {values['a']} and {values['b']}" for name, values in settings.items()]
    shown = differing if all else differing[:MOST]
    if shown:
        columns = ("tensor", "status", "norm in first", "norm in second", "norm of difference", "relative")
        parts.append(Table(columns, [_cells(row) for row in shown]))
    if len(shown) < len(differing):
        parts.append(f"and {len(differing) - len(shown):,} more that differ: --all lists them")
    parts += _change_parts(changes, notes, len(changes) if all else MOST)
    return Answer(data, parts, code=1 if exit_code and not equal else 0)


def _changes(a: Path, b: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What two adapters change of each weight, compared; and notes on what can't be compared."""
    folders = [path if path.is_dir() else path.parent for path in (a, b)]
    names = [names_in(folder) for folder in folders]
    if not all(name and (path.is_dir() or path.name == name[0]) for path, name in zip((a, b), names, strict=True)):
        return [], []
    (first, why_a), (second, why_b) = (changes_of(path, describe_adapter(path)["sites"]) for path in folders)
    whys, without = {"the first": why_a, "the second": why_b}, "are not computed without its base"
    notes = [f"the changes of weights by {side} {without}: {why}" for side, why in whys.items() if why]
    return ([] if notes else compare_changes(first, second)), notes


def _change_parts(changes: list[dict[str, Any]], notes: list[str], most: int) -> list[str | Table]:
    parts: list[str | Table] = ["", *notes] if notes else []
    if not changes:
        return parts
    compared = [row for row in changes if row["status"] == "compared"]
    parts += ["", f"ΔW, the change of each weight, from the files: {len(compared):,} of {len(changes):,} are in both"]
    changes = sorted(changes, key=lambda row: -(row["relative"] if row["relative"] is not None else float("inf")))
    columns = ("weight", "status", "norm in first", "norm in second", "norm of difference", "relative", "cosine")
    numbers = ("norm_a", "norm_b", "difference", "relative", "cosine")
    rows = [[row["weight"], row["status"], *(_number(row[name]) for name in numbers)] for row in changes[:most]]
    parts.append(Table(columns, rows))
    if len(changes) > most:
        parts.append(f"and {len(changes) - most:,} more weights: --all lists them")
    return parts


def _tensors(path: Path) -> dict[str, Place]:
    """The tensors of an adapter under `<site>.<tensor>`, and those of a model under their own names."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise SurgeryError(f"{path} can't be compared", why="only safetensors files are read", fix="save it as one")
        adapter = names_in(path.parent) if (names_in(path.parent) or ("",))[0] == path.name else None
        files = [path]
    else:
        adapter = names_in(path)
        if adapter is not None and not adapter[0].endswith(".safetensors"):
            raise SurgeryError(f"{path / adapter[0]} is a pickle", why="pickles are not opened", fix="save it again")
        files = [path / adapter[0]] if adapter else weight_files(path)[0]
    if not files:
        raise SurgeryError(f"{path} holds no safetensors file", fix="name an adapter's or a model's folder")
    places: dict[str, Place] = {}
    for file in files:
        header = read_header(file)
        if adapter is None:
            named = {key: (key, tensor) for key, tensor in header.tensors.items()}
        else:
            ours = adapter[0] == SURGERY[0]
            keys = {key: key for key in header.tensors} if ours else peft_keys(header)
            named = {_name(today, ours): (key, header.tensors[key]) for today, key in keys.items()}
        places |= {name: Place(file, key, tensor) for name, (key, tensor) in named.items()}
    return places


def _name(key: str, ours: bool) -> str:
    """One name for a tensor in both formats, as far as that is plain: LoRA's A and B."""
    path, name = our_place(key) if ours else peft_place(key)
    return ".".join(filter(None, (path, _NAMES.get(name, name))))


_NAMES = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}


def _compare(name: str, a: Place | None, b: Place | None) -> dict[str, Any]:
    row: dict[str, Any] = {"tensor": name, "status": "equal", "norm_a": None, "norm_b": None}
    row |= {"difference": None, "relative": None, "shape_a": None, "shape_b": None, "dtype_a": None, "dtype_b": None}
    for place, side in ((a, "a"), (b, "b")):
        if place is not None:
            row |= {f"shape_{side}": list(place.header.shape), f"dtype_{side}": place.header.dtype}
    if a is None or b is None or a.header.shape != b.header.shape:
        row |= {f"norm_{side}": norm_of(place) for side, place in (("a", a), ("b", b)) if place is not None}
        only = "only in second" if a is None else "only in first"
        return {**row, "status": only if a is None or b is None else "other shape"}
    found = compare_tensors(a, b)
    row |= {"norm_a": found.norm_a, "norm_b": found.norm_b}
    if found.same and a.header.dtype == b.header.dtype:
        return {**row, "difference": 0.0, "relative": 0.0}
    relative = found.difference / found.norm_a if found.norm_a else float("inf") if found.difference else 0.0
    status = "other dtype" if found.same else "different"
    return {**row, "status": status, "difference": found.difference, "relative": relative}


def _setting_differences(a: Path, b: Path) -> dict[str, Any]:
    """The settings of two adapters that differ, by name; fields of rules only within one format."""
    if not all(path.is_dir() and names_in(path) for path in (a, b)):
        return {}
    first, second = (describe_adapter(path) for path in (a, b))
    names = ["format", "base", "licence", "metadata"]
    if first["format"] == second["format"]:
        names.append("rules")
    x, y = (_flat({name: plain(side.get(name)) for name in names}) for side in (first, second))
    return {
        name: {"a": x.get(name), "b": y.get(name)} for name in dict.fromkeys([*x, *y]) if x.get(name) != y.get(name)
    }


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as one mapping: `rules.0.rank`."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        data = {str(index): item for index, item in enumerate(data)}
    if not isinstance(data, dict):
        return {path: data}
    items = [_flat(item, f"{path}.{name}" if path else name) for name, item in data.items()]
    return {name: item for part in items for name, item in part.items()}


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = [row[name] for name in ("norm_a", "norm_b", "difference", "relative")]
    status = row["status"]
    if status == "other shape":
        status += f" {row['shape_a']} and {row['shape_b']}"
    return [row["tensor"], status, *map(_number, numbers)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
