"""Writes the model card of a façade's adapters: what they are, how they are loaded, and what the author has to add."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.adapter_files.entry import SURGERY as OWN_FORMAT
from surgery.adapter_files.entry import names_in
from surgery.patterns.module_class import class_of
from surgery.patterns.wrappers import unwrap
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import sites
from surgery.transaction.created_folder import created_folder

__all__ = ["write_card"]

# Fields of a configuration that the card has elsewhere.
_UNTOLD = frozenset(
    "peft_type task_type base_model_name_or_path revision inference_mode peft_version auto_mapping".split()
)


def write_card(facade: Any, folder: Path, name: str | None = None) -> str:
    """Write the model card of a façade's adapters, or complete the metadata of the card that is there.

    Args:
        name: what the adapters are loaded by: a repository; default None: the folder's name.

    Returns:
        The card's text.
    """
    model, place = facade._base, folder / "README.md"
    text = place.read_text(encoding="utf-8") if place.exists() else _body(facade, folder, name or folder.name)
    head, body = _head_of(text)
    base = _base_name(facade)
    library = "peft" if any(_is_pefts(folder, adapter) for adapter in _adapters(facade, folder)) else "model-surgery"
    told = {"library_name": library, **({"base_model": base} if base else {})}
    if facade._task == "CAUSAL_LM" and not any(line.startswith("pipeline_tag:") for line in head):
        told["pipeline_tag"] = "text-generation"
    tags = [line.removeprefix("- ").strip() for line in _block(head, "tags")]
    tags += [*(getattr(model, "model_tags", None) or ()), *_tags(facade, base)]
    head = [line for line in _without(head, "tags") if line.partition(":")[0] not in told]
    head += [f"{key}: {value}" for key, value in told.items()]
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))] if tags else []
    text = "\n".join(["---", *head, "---", *body]) + "\n"
    with created_folder(folder):
        place.write_text(text, encoding="utf-8")
    return text


def _body(facade: Any, folder: Path, name: str) -> str:
    """The text of a new card."""
    base, title = _base_name(facade), Path(name).name
    of = f"[`{base}`](https://huggingface.co/{base})" if _is_repository(base) else f"`{base or _class_name(facade)}`"
    adapters = _adapters(facade, folder)
    several = len(adapters) > 1
    lines = ["---", "tags:", "- model-surgery", "---", "", f"# {title}", ""]
    lines += [f"{'Adapters' if several else 'An adapter'} for {of}. The base model itself is not in these files.", ""]
    lines += ["| adapter | method | task | modules | parameters | files |", "|---|---|---|---:|---:|---|"]
    lines += [_row(facade, folder, adapter) for adapter in adapters]
    lines += ["", "## Load", ""]
    lines += _loading(facade, folder, name, adapters)
    lines += ["## Configuration", "", "The fields that differ from the defaults of PEFT:", ""]
    for adapter in adapters:
        settings = json.dumps(_settings(facade._configs[adapter]), indent=2, default=str)
        lines += [*([f"`{adapter}`:", ""] if several else []), "```json", settings, "```", ""]
    lines += _quantisation(unwrap(facade._base))
    lines += [
        "## For the author to add",
        "",
        "A program wrote this card when the files were saved. It does not know the following; say it here:",
        "",
        "- the licence, the language, and what the adapter is meant for, or should not be used for",
        "- the data and the settings of the training",
        "- how the adapter was evaluated, with the results",
        "- risks and limits, beside those of the base model",
        "",
        "## Framework versions",
        "",
        *_versions(),
    ]
    return "\n".join(lines) + "\n"


def _adapters(facade: Any, folder: Path) -> list[str]:
    """The adapters whose files are in the folder; all adapters if no file is there yet."""
    places = {adapter: folder if adapter == "default" else folder / adapter for adapter in facade._configs}
    return [adapter for adapter, place in places.items() if names_in(place)] or list(places)


def _row(facade: Any, folder: Path, adapter: str) -> str:
    """The row of an adapter in the card's table."""
    by_site = [tensors_of(module, adapter) for _, module, _ in sites(unwrap(facade._base))]
    tensors = {id(tensor): tensor for tensors in by_site for tensor in tensors.values()}  # tied modules share them
    count, config = sum(tensor.numel() for tensor in tensors.values()), facade._configs[adapter]
    place = f"`{adapter}/`" if adapter != "default" else "this folder"
    place += "" if _is_pefts(folder, adapter) else ", in model-surgery's format"
    task = config.task_type or "–"
    return f"| `{adapter}` | {config.method} | {task} | {sum(map(bool, by_site)):,} | {count:,} | {place} |"


def _is_pefts(folder: Path, adapter: str) -> bool:
    """Whether an adapter's files are in PEFT's format; True if they are not there yet."""
    return names_in(folder if adapter == "default" else folder / adapter) != OWN_FORMAT


def _loading(facade: Any, folder: Path, name: str, adapters: Sequence[str]) -> list[str]:
    """How the adapters are loaded, with PEFT and with model-surgery."""
    base, kind = _base_name(facade), class_of(unwrap(facade._base))
    model = [f"model = ...  # the {kind.__name__} that the adapter was trained on"]
    if base and kind.__module__.startswith("transformers."):
        model = [f"from transformers import {kind.__name__}", "", f'model = {kind.__name__}.from_pretrained("{base}")']
    place = {adapter: "" if adapter == "default" else f', subfolder="{adapter}"' for adapter in adapters}
    pefts, lines = [adapter for adapter in adapters if _is_pefts(folder, adapter)], list[str]()
    if pefts:
        first, *rest = pefts
        lines += ["With [PEFT](https://huggingface.co/docs/peft), or with the same names from `surgery.peft`:", ""]
        lines += ["```python", "from peft import PeftModel", *model]
        lines += [f'model = PeftModel.from_pretrained(model, "{name}", adapter_name="{first}"{place[first]})']
        lines += [f'model.load_adapter("{name}", "{adapter}"{place[adapter]})' for adapter in rest]
        lines += ["```", ""]
    lines += ["With model-surgery, which changes the model itself:", "", "```python"]
    lines += ["from surgery import load_adapter", *model]
    lines += [f'load_adapter(model, "{name}", "{adapter}"{place[adapter]})' for adapter in adapters]
    return [*lines, "```", ""]


def _settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults."""
    told = {}
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in _UNTOLD and value is not None and value != default:
            told[field.name] = sorted(value) if isinstance(value, set) else value
    return told


def _quantisation(model: Any) -> list[str]:
    """The base's quantisation, if it has one."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return []
    data = settings if isinstance(settings, dict) else settings.to_dict()
    lines = ["## Training procedure", "", "The base model was quantised during the training:", ""]
    return [*lines, *(f"- {key}: {value}" for key, value in data.items()), ""]


def _versions() -> list[str]:
    """The versions of the libraries that are imported."""
    lines = [f"- model-surgery {__version__}"]
    named = {"torch": "PyTorch", "transformers": "Transformers", "peft": "PEFT", "datasets": "Datasets"}
    for module, label in named.items():
        version = getattr(sys.modules.get(module), "__version__", None)
        lines += [f"- {label} {version}"] if version else []
    return lines


def _base_name(facade: Any) -> str | None:
    return getattr(getattr(facade._base, "config", None), "_name_or_path", None) or None


def _is_repository(base: str | None) -> bool:
    return base is not None and base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).exists()


def _class_name(facade: Any) -> str:
    return class_of(unwrap(facade._base)).__name__


def _tags(facade: Any, base: str | None) -> list[str]:
    """The tags by which the hub finds an adapter, as PEFT gives them."""
    tags = ["lora"] if any(config.method == "LORA" for config in facade._configs.values()) else []
    tags += ["transformers"] if hasattr(facade._base, "prepare_inputs_for_generation") or base is not None else []
    return tags + ([f"base_model:adapter:{base}"] if base else [])


def _head_of(text: str) -> tuple[list[str], list[str]]:
    """The lines of a card's metadata, and the lines after it."""
    lines = text.splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return [], ["", *lines]
    end = lines.index("---", 1)
    return lines[1:end], lines[end + 1 :]


def _block(head: list[str], name: str) -> list[str]:
    """The items of a list in the metadata."""
    start = next((i for i, line in enumerate(head) if line.startswith(f"{name}:")), None)
    if start is None:
        return []
    inline = head[start].partition(":")[2].strip().strip("[]")
    if inline:
        return [f"- {item.strip()}" for item in inline.split(",")]
    items = list[str]()
    for line in head[start + 1 :]:
        if not line.lstrip().startswith("- "):
            break
        items.append(line.lstrip())
    return items


def _without(head: list[str], name: str) -> list[str]:
    """The metadata without one list."""
    kept, inside = list[str](), False
    for line in head:
        inside = line.startswith(f"{name}:") or (inside and line.lstrip().startswith("- "))
        if not inside:
            kept.append(line)
    return kept
