"""`surgery inspect`: what a file or a folder holds. Reads headers and settings, no weights, and opens no pickle."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.adapter_files.entry import BARE, OLD, PEFT, SURGERY, names_in
from surgery.commands.adapter_description import describe_adapter
from surgery.commands.answer import Answer, Table, size_text
from surgery.commands.model_description import PICKLES, describe_model, describe_tensors
from surgery.commands.model_folder import CONFIG
from surgery.commands.onnx_description import describe_adapter_of_slots, describe_onnx
from surgery.commands.other_formats import describe_other
from surgery.commands.paths import existing, size_of
from surgery.commands.weight_files import INDEX
from surgery.errors import SurgeryError
from surgery.storage.formats.place import adapter_file

__all__ = ["inspect"]

MOST = 20  # rows of the table of sites, without --all


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An adapter, a model, or a file: safetensors, ONNX.", show_default=False),
    ],
    all: Annotated[bool, typer.Option("--all", help=f"List all sites; default: the first {MOST}.")] = False,
) -> Answer:
    """Show what a file or folder holds: format, rules, sites, ranks, size, base, and what opens it.

    Reads headers and settings, never weights or pickles.

        surgery inspect adapters/topics
    """
    description = _describe(existing(path))
    data = {"path": str(path), "nbytes": size_of(path), **description}
    return Answer(data, _parts(data, all))


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _describe_folder(path)
    if path.suffix == ".onnx":
        return describe_onnx(path)
    if path.suffix == ".onnx_adapter":
        return describe_adapter_of_slots(path)
    if path.name in (*SURGERY, *PEFT, OLD, *BARE):
        return describe_adapter(path.parent)
    if path.suffix == ".safetensors":
        return describe_other(path) or describe_tensors(path)
    if path.suffix == ".gguf" and (described := describe_other(path)):
        return described
    if path.name in (CONFIG, INDEX):
        return describe_model(path.parent)
    if path.suffix in PICKLES:
        opens = ["torch.load(…, weights_only=True)"]
        return {"format": "a pickle of PyTorch, which is not opened here", "opens_with": opens}
    fix = "an adapter, a model of transformers, or a file: .safetensors, .onnx, .onnx_adapter"
    raise SurgeryError(f"{path} has a format that is not known here", why=f"it ends in {path.suffix!r}", fix=fix)


def _describe_folder(folder: Path) -> dict[str, Any]:
    if names_in(folder):
        return describe_adapter(folder)
    if (folder / CONFIG).is_file() or any(folder.glob("model*.safetensors")):
        return describe_model(folder)
    if (file := adapter_file(folder)) is not None and (described := describe_other(file)):
        return described
    inner = {part.name: part for part in sorted(folder.iterdir()) if part.is_dir() and names_in(part)}
    if inner:
        described = {name: describe_adapter(part) for name, part in inner.items()}
        return {"format": "a folder of adapters", "adapters": described, "opens_with": ["surgery.load_adapters"]}
    files = sorted(file.name for file in folder.iterdir())
    why = f"it holds {', '.join(files[:8])}{', …' if len(files) > 8 else ''}" if files else "it is empty"
    raise SurgeryError(f"{folder} holds no adapter and no model", why=why, fix="name one of its files or subfolders")


_LABELS = {
    "format": "format", "base": "base", "class": "class", "parameters": "parameters", "dtypes": "dtypes",
    "ranks": "ranks", "licence": "licence", "metadata": "metadata", "inputs": "inputs", "outputs": "outputs",
    "opset": "opset", "slots": "slots", "shards": "shards", "missing": "missing", "tied": "tied",
    "opens_with": "opens with",
}  # fmt: skip


def _parts(data: dict[str, Any], all_sites: bool) -> list[str | Table]:
    lines = [f"{data['path']}: {size_text(data['nbytes'])}"]
    lines += [f"  {label:<11} {_text(data[name])}" for name, label in _LABELS.items() if data.get(name)]
    lines += [f"  rule        {_text(rule)}" for rule in data.get("rules", ())]
    lines += [f"  note        {note}" for note in data.get("notes", ())]
    parts: list[str | Table] = ["\n".join(lines)]
    sites = data.get("sites", [])
    shown = sites if all_sites else sites[:MOST]
    if shown:
        rows = [[site["path"] or "(the model)", str(site.get("rank") or ""), _shapes(site)] for site in shown]
        parts += ["", Table(["site", "rank", "tensors"], rows)]
    if len(shown) < len(sites):
        parts.append(f"and {len(sites) - len(shown):,} more sites: --all lists them")
    for name, adapter in data.get("adapters", {}).items():
        ranks = f", ranks {_text(adapter['ranks'])}" if adapter["ranks"] else ""
        parts.append(f"  {name}: {adapter['format']}, {len(adapter['sites'])} sites{ranks}")
    return parts


def _shapes(site: dict[str, Any]) -> str:
    return " ".join(f"{name}{shape}" for name, shape in site["tensors"].items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        if "rule" in value:
            fields = {name: item for name, item in value.items() if name not in ("rule", "version")}
            said = [f"{name}={item!r}" for name, item in fields.items() if item not in (None, False, [], {}, "")]
            return textwrap.shorten(f"{value['rule']}: {', '.join(said)}", 300, placeholder=" …")
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
