"""Puts adapters from files on a model, each under a name of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.adapter_files.entry import PEFT, SURGERY
from surgery.adapter_files.plain_json import read_json
from surgery.commands.paths import existing
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["base_class", "load_all", "names_of"]


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each adapter: of its folder, or of its file without an ending."""
    names = [_name(path) for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SurgeryError(f"two adapters have the name {twice!r}", why="the name is that of the folder or file")
    return names


def load_all(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    trust: bool,
    same_base: bool,
    example: Any = None,
    together: bool = True,
) -> list[dict[str, Any]]:
    """Puts adapters on a model. Returns what each report says.

    Each is loaded while the earlier ones are idle, so adapters that can't be live together can be on one model.
    `together`: all are live at the end, and it is an error if they can't be. False: they are live if they can be.
    """
    from surgery import activate, load_adapter

    reports, names = [], names_of(paths)
    for path, name in zip(paths, names, strict=True):
        if reports:
            _make_idle(model)
        options: dict[str, Any] = {"trust": trust, "same_base": same_base, "example_inputs": example}
        reports.append(load_adapter(model, existing(path), name, progress=True, **options).to_dict())
    if len(names) > 1:
        try:
            activate(model, names)
        except SurgeryError:
            if together:
                raise
            _make_idle(model)
    return reports


def _make_idle(model: nn.Module) -> None:
    """Makes all adapters idle. One that changed the base's weights can't be, and stays live."""
    from surgery import deactivate

    with contextlib.suppress(SurgeryError):
        deactivate(model)


def base_class(paths: Sequence[Path]) -> str | None:
    """The class of the model that the first adapter was made on, if its files say so."""
    for path in paths[:1]:
        folder = existing(path) if path.is_dir() else path.parent
        for name in (SURGERY[1], PEFT[1]):
            if (folder / name).is_file() and isinstance(data := read_json(folder / name), dict):
                places = [(data.get("base"), "class"), (data.get("auto_mapping"), "base_model_class")]
                named = [place.get(key) for place, key in places if isinstance(place, dict)]
                return next((kind for kind in named if isinstance(kind, str)), None)
    return None


def _name(path: Path) -> str:
    name = path.resolve().name if path.is_dir() else path.stem
    if path.name in (SURGERY[0], PEFT[0]):
        name = path.resolve().parent.name
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name)
