"""`unmerge_files`: restores the files of a base checkpoint from a merged one, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.arithmetic.corrections import Record
from surgery.arithmetic.exact_fold import unfold
from surgery.checkpoints.base_skeleton import base_names
from surgery.checkpoints.checkpoint_files import CheckpointFiles, open_checkpoint
from surgery.checkpoints.file_reports import FileUnmergeReport
from surgery.checkpoints.ledger import open_ledger
from surgery.checkpoints.merge_plan import check_meta, check_outside
from surgery.checkpoints.merge_record import EARLIER, FOLDER, FORMAT, LIST, VERSION, read_record
from surgery.checkpoints.name_map import NameGroup, NameMap
from surgery.checkpoints.other_files import copy_folder, copy_other_files
from surgery.checkpoints.shard_layout import layout_of_head
from surgery.checkpoints.shard_rewriting import Rewriting, Task, rewrite_shards
from surgery.errors import MergeError, SurgeryError, abbreviate
from surgery.progress import Progress
from surgery.transaction.created_folder import check_new_folder
from surgery.transaction.neutral_context import neutral

__all__ = ["unmerge_files"]

_RESTORE = "restore the merged files, or take the base from its source"


def unmerge_files(
    merged_folder: str | Path,
    out_folder: str | Path,
    *,
    workers: int = 1,
    model: nn.Module | None = None,
    progress: Progress = False,
) -> FileUnmergeReport:
    """Restore the files of a base from a checkpoint that `merge_files(…, keep_record=True)` wrote, bit for bit.

        unmerge_files("merged", "base")

    As `merge_files`, it needs the memory of a few tensors, goes on after a kill, and gives the folder its name when
    it is complete.

    Args:
        merged_folder: the merged checkpoint, with its records.
        out_folder: the folder to write; new or empty.
        workers: the number of threads. Default 1.
        model: as for `merge_files`.
        progress: as for `merge_files`.

    Returns:
        A `FileUnmergeReport` with the SHA-256 of each weight file, which is that of the base's file.

    Raises:
        MergeError: the weights changed since the merge. No folder is made.
        SurgeryError: files or records are absent or damaged, or the folder is not empty.
    """
    merged, out = Path(merged_folder), Path(out_folder)
    check_new_folder(out)
    check_outside(out, merged, "the merged folder")
    check_meta(model)
    data = _read_list(merged)
    with neutral(None), torch.no_grad():
        files = open_checkpoint(merged)
        shards: dict[str, Any] = data["shards"]
        if absent := [name for name in shards if name not in files.shards]:
            why, fix = abbreviate(absent, "files"), "restore the files that merge_files wrote"
            raise SurgeryError("weight files are absent", where=str(merged), why=why, fix=fix)
        if unknown := [name for name in files.shards if name not in shards]:
            why = f"{LIST} does not describe {abbreviate(unknown, 'files')}"
            raise SurgeryError(f"{LIST} does not fit the files", where=str(merged), why=why, fix=_RESTORE)
        names = base_names(files, model)
        tasks = _tasks(files, names, merged, shards, data.get("twins", {}))
        heads = {name: bytes.fromhex(facts["head"]) for name, facts in shards.items() if "head" in facts}
        for name, head in heads.items():
            _check_head(files, name, head)
        job = Rewriting(files, tasks, strong=True, heads=heads)
        with open_ledger(out) as ledger:
            ledger.start([files.identity(), "unmerge", {name: facts["base"] for name, facts in shards.items()}])
            reused = rewrite_shards(job, ledger, workers, progress, "unmerge")
            sums = {name: line["checksum"] for name, line in ledger.done.items()}
            if wrong := [name for name, facts in shards.items() if sums[name] != facts["base"]]:
                why = "other tensors than the merged ones, or the header, changed since the merge"
                where = abbreviate(wrong)
                raise MergeError("the files of the base do not come back", where=where, why=why, fix=_RESTORE)
            texts: dict[str, str] = data["files"]
            for name, text in texts.items():
                (ledger.files / name).write_bytes(text.encode())
            if files.index is not None and files.index not in texts:
                (ledger.files / files.index).write_bytes((merged / files.index).read_bytes())
            own = {*files.shards, *filter(None, [files.index])}
            left_out = copy_other_files(merged, ledger.files, {*texts, *own})
            if (merged / FOLDER / EARLIER).is_dir():
                copy_folder(merged / FOLDER / EARLIER, ledger.files / FOLDER)
            ledger.finish()
    return FileUnmergeReport(out, sums, tuple(reused), tuple(left_out))


def _read_list(merged: Path) -> dict[str, Any]:
    place = merged / FOLDER / LIST
    if not place.is_file():
        fix = "merge_files(…, keep_record=True) writes records"
        raise SurgeryError(f"{merged} can't be unmerged", why=f"it has no {FOLDER}/{LIST}", fix=fix)
    data = read_json(place, LARGE)
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("shards"), dict):
        raise SurgeryError(f"{LIST} is damaged", where=str(place), why=f"it is not a {FORMAT}")
    if data.get("version") != VERSION:
        what = f"its records have version {data.get('version')!r}"
        raise SurgeryError(what, where=str(place), why=f"this release reads version {VERSION}", fix="update")
    files = data.get("files")
    texts = isinstance(files, dict) and all(isinstance(text, str) for text in files.values())
    if not texts or not all(map(_is_shard, data["shards"].values())):
        raise SurgeryError(f"{LIST} is damaged", where=str(place), why="it does not describe the folds of each file")
    twins = data.get("twins", {})
    lists = list(twins.values()) if isinstance(twins, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise SurgeryError(f"{LIST} is damaged", where=str(place), why="it does not name the twins of tensors")
    if any(Path(name).name != name or name in ("", "..", FOLDER) for name in (*data["shards"], *data["files"])):
        raise SurgeryError(f"{LIST} is damaged", where=str(place), why="it names files outside of the folder")
    return data


def _is_shard(facts: Any) -> bool:
    """Whether an entry of the list describes a file: its checksum, its header, and folds of tensors by their names."""
    if not (isinstance(facts, dict) and isinstance(facts.get("base"), str) and isinstance(facts.get("folds"), list)):
        return False
    head = facts.get("head", "")
    if not (isinstance(head, str) and not set(head) - set("0123456789abcdef") and len(head) % 2 == 0):
        return False
    return all(isinstance(fold, dict) and isinstance(fold.get("tensor"), str) for fold in facts["folds"])


def _check_head(files: CheckpointFiles, name: str, head: bytes) -> None:
    """Raises `SurgeryError` unless a header of the base places tensors of the merged file, side by side."""
    stored, end = files.shards[name].tensors, len(head)
    wrong = int.from_bytes(head[:8], "little") != len(head) - 8
    for key, place in sorted(layout_of_head(head).tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        own = stored.get(key)
        same = own is not None and (own.code, own.shape, own.nbytes) == (place.code, place.shape, place.nbytes)
        wrong = wrong or not same or place.start != end
        end = place.start + place.nbytes
    if wrong:
        why = f"the header of {name} does not fit the tensors of the merged file"
        raise SurgeryError(f"{LIST} is damaged", where=str(files.folder), why=why, fix=_RESTORE)


def _tasks(
    files: CheckpointFiles, names: NameMap, merged: Path, shards: Mapping[str, Any], twins: Mapping[str, list[Any]]
) -> list[Task]:
    """One task for each group of names with records. `twins`: further names of its tensors in the files."""
    folds: dict[int, list[tuple[str, Path, Any]]] = {}
    groups: dict[int, NameGroup] = {}
    for shard, facts in shards.items():
        file = merged / FOLDER / f"{shard}.record"
        for fold in facts["folds"]:
            for name in (fold["tensor"], *twins.get(fold["tensor"], ())):
                if name not in names.of_memory:
                    why = "the files do not hold this tensor"
                    raise SurgeryError(f"{LIST} does not fit the files", where=str(name)[:200], why=why)
            group = names.of_memory[fold["tensor"]]
            groups[id(group)] = group
            folds.setdefault(id(group), []).append((fold["tensor"], file, fold))
    tasks: list[Task] = []
    for key, group in groups.items():
        further = {twin: name for name in group.memory for twin in twins.get(name, ())}
        copies = [(names.of_memory[twin], twin, name) for twin, name in further.items()]
        disk = (*group.disk, *(name for other, _, _ in copies for name in other.disk))
        tasks.append(Task(disk, partial(_unfold_group, files, group, folds[key], copies)))
    return tasks


def _unfold_group(
    files: CheckpointFiles,
    group: NameGroup,
    folds: list[tuple[str, Path, Any]],
    copies: list[tuple[NameGroup, str, str]],
) -> tuple[dict[str, Tensor], list[tuple[str, Record]]]:
    values = dict(group.to_memory({disk: files.read(disk) for disk in group.disk}))
    for name, file, facts in reversed(folds):
        values[name], record = values[name].contiguous(), read_record(file, facts)
        try:
            unfold(values[name], record, where=name)
        except SurgeryError as error:
            error.fix = _RESTORE
            raise
        except Exception as error:  # a damaged record may have factors and corrections of any size
            why = f"{type(error).__name__}: {error}"[:200]
            raise SurgeryError(f"{file.name} is damaged", where=name, why=why) from error
    new = group.to_disk(values)
    for other, twin, name in copies:
        new |= other.to_disk({twin: values[name]})
    return new, []
