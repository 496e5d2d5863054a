"""Loads all adapters of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.entry import PEFT, SURGERY, names_in
from surgery.adapter_files.plain_json import read_json
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import LoadError, PlanError, SurgeryError, near_misses
from surgery.lifecycle.activation import activate, deactivate
from surgery.lifecycle.switching import weights_now
from surgery.patterns.wrappers import unwrap
from surgery.peft_format.adapter_config import PeftConfig
from surgery.peft_format.methods import structure_rules
from surgery.peft_format.targets import Modules
from surgery.state.records import model_state
from surgery.storage.formats.place import has_known_file
from surgery.storage.load import load_adapter
from surgery.storage.load_report import LoadReport
from surgery.storage.stored_adapter import stored_adapter
from surgery.transaction.neutral_context import verb

__all__ = ["load_adapters"]


@verb
def load_adapters(
    model: nn.Module, folder: str | Path, *, live: str | Sequence[str] | None = None, **options: Any
) -> dict[str, LoadReport]:
    """Load every adapter in a folder, each under its subfolder's name, in PEFT's format or this library's.

    >>> import tempfile
    >>> from torch import nn
    >>> from surgery import active, apply_rules, load_adapters, remove, save_adapter
    >>> from surgery.rules import LoraRule
    >>> model, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> for name in ("news", "mail"):
    ...     _ = save_adapter(apply_rules(model, [LoraRule("0", rank=2)], adapter=name), f"{folder}/{name}", name)
    >>> list(load_adapters(remove(model), folder))
    ['mail', 'news']
    >>> _ = load_adapters(remove(model), folder, live="news")
    >>> active(model)
    ('news',)

    Files in the folder itself are the adapter "default". Adapters with structural rules are loaded first.

    Args:
        model: the model.
        folder: a folder with a subfolder per adapter.
        live: the adapters that are live afterwards, new or old, as in `activate` ([]: none). With `live`, adapters that
            can't be live together can be loaded, such as those with a head of their own (TrainRule). Default None:
            adapters from before keep their state, and all new ones are live.
        options: `load_adapter`'s.

    Returns:
        The report of each adapter, by name.

    Raises:
        LoadError: lists what is wrong with any adapter; none stays on the model, and the same adapters are live as
            before.
        SurgeryError: a name in `live` is neither on the model nor in the folder.
    """
    model, folder = unwrap(model), Path(folder)
    folders = {"default": folder} if names_in(folder) else {}
    if folder.is_dir():
        folders |= {inner.name: inner for inner in sorted(folder.iterdir()) if inner.is_dir() and _has_adapter(inner)}
    if not folders:
        raise LoadError([SurgeryError(f"{folder} holds no adapters", fix="name a folder of folders of adapters")])
    state = model_state(model)
    before = weights_now(state) if state is not None else {}
    wanted = None if live is None else [live] if isinstance(live, str) else list(live)
    known = [*(state.adapters if state is not None else []), *folders]
    if unknown := [name for name in wanted or [] if name not in known]:
        why = near_misses(unknown[0], known) or f"there are {', '.join(known)}"
        raise SurgeryError(f"live={unknown[0]!r} is not an adapter on the model or in the folder", why=why)
    reports = dict[str, LoadReport]()
    structural, waiting = _structural(model, folders), list(folders)
    waiting.sort(key=lambda name: name not in structural)
    while waiting:  # an adapter of a cut model is read again after the adapter that cuts
        failed, problems = list[str](), list[SurgeryError]()
        for name in waiting:
            if wanted is not None and (reports or before):
                _rest(model)
            try:
                reports[name] = load_adapter(model, folders[name], name, **options)
            except PlanError as error:
                failed.append(name)
                problems += [SurgeryError(str(problem), where=str(folders[name])) for problem in error.problems]
        if problems and (not structural or len(failed) == len(waiting)):
            raise LoadError(problems)
        waiting = failed
    if wanted is not None:
        activate(model, wanted)
    return reports


def _has_adapter(folder: Path) -> bool:
    """Whether a folder holds the file of one adapter, in any format."""
    return names_in(folder) is not None or has_known_file(folder)


def _rest(model: nn.Module) -> None:
    """Make the adapters idle that can be: those with structural rules alone stay live."""
    state = model_state(model)
    if state is not None and len(state.structural) < len(state.adapters):
        deactivate(model)


def _may_restructure(model: nn.Module, folder: Path) -> bool:
    """Whether the files of an adapter may have structural rules. PEFT's are not opened unless their settings have."""
    if (names_in(folder) or ("",))[0] == SURGERY[0]:
        return True
    try:
        settings = read_json(folder / PEFT[1])
        return isinstance(settings, dict) and bool(structure_rules(PeftConfig(settings, Modules.of(model))))
    except (OSError, SurgeryError):  # `load_adapter` raises it again
        return False


def _structural(model: nn.Module, folders: Mapping[str, Path]) -> list[str]:
    """The adapters with structural rules. They come first, because the others may need the structure."""
    structural: list[str] = []
    for name, inner in folders.items():
        if not _may_restructure(model, inner):
            continue
        try:
            stored = stored_adapter(model, inner, None, None)
        except LoadError:  # `load_adapter` raises it again
            continue
        if any(isinstance(rule, StructureRule) for rule in stored.rules):
            structural.append(name)
    return structural
