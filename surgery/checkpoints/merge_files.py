"""`merge_files`: merges adapters into the files of a base checkpoint, without loading the model."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import surgery
from surgery.checkpoints.base_skeleton import CONFIG, read_config
from surgery.checkpoints.checkpoint_files import INDEX
from surgery.checkpoints.dequantised_files import plain_config, plain_dtypes
from surgery.checkpoints.file_reports import FileMergeReport
from surgery.checkpoints.ledger import Ledger, open_ledger
from surgery.checkpoints.loaded_adapters import names_of
from surgery.checkpoints.merge_plan import MergePlan, check_arguments, plan_merge
from surgery.checkpoints.merge_record import EARLIER, FOLDER, FORMAT, LIST, VERSION
from surgery.checkpoints.merge_units import merge_unit
from surgery.checkpoints.new_dtypes import config_with_dtype, new_dtypes
from surgery.checkpoints.other_files import copy_folder, copy_other_files
from surgery.checkpoints.shard_rewriting import Rewriting, Task, rewrite_shards
from surgery.checkpoints.shard_writing import checksum_of
from surgery.checkpoints.untied_tensors import untied_config
from surgery.progress import Progress
from surgery.state.parameter_owners import Owners
from surgery.transaction.neutral_context import neutral

__all__ = ["merge_files"]

Source = str | Path


def merge_files(
    base_folder: str | Path,
    adapter: Source | Sequence[Source],
    out_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    keep_record: bool = False,
    untie: bool = False,
    weights: Sequence[float] | None = None,
    workers: int = 1,
    model: nn.Module | None = None,
    same_base: bool = True,
    trust: bool = False,
    quantised: Literal["refuse", "dequantise"] = "refuse",
    progress: Progress = False,
) -> FileMergeReport:
    """Merge adapters into the files of a checkpoint, without loading the model.

        merge_files("models/llama-70b", "adapters/topics", "merged")

    The files are written one after the other, tensor by tensor. The memory is about three times the largest tensor for
    each worker, whatever the size of the model. The result has the names of files, the index and the configuration of
    the base, and the same bits as `merge_to` writes for the loaded model.

    A run that was killed goes on where it stopped: call the function again with the same arguments. Finished files
    are compared with their checksums and not written again. The folder gets its name when it is complete.

    Args:
        base_folder: a folder with `config.json` and the weights: safetensors files with or without an index, or
            `pytorch_model.bin`, which becomes safetensors.
        adapter: a folder, file or repository, as for `load_adapter`; or several, which are merged together.
        out_folder: the folder to write; new or empty.
        dtype: the dtype of the result's floating tensors. The sum is computed in the wider one of both dtypes, and
            rounded once. Default None: each tensor keeps its dtype.
        keep_record: whether to write records, with which `unmerge_files` restores the base's files to the bit. They
            are about 0.08 bytes for each entry of a weight with a low-rank change, and a copy for other changes.
        untie: as for `merge_to`, for a head that shares the embedding's weight.
        weights: a weight for each adapter; default 1.
        workers: the number of threads; each needs the memory of one tensor. Default 1.
        model: the base's model on the meta device, which gets the adapters. Default None: the one that `config.json`
            names.
        same_base: as for `load_adapter`. Default True: another base is an error.
        trust: as for `load_adapter`. Default False.
        quantised: what happens to a base in MXFP4 or in transformers' fine-grained FP8. "refuse" (default): an error.
            "dequantise": the result is an unquantised checkpoint, in `dtype` or that of the configuration. Also the
            weights without an adapter are dequantised.
        progress: as for `merge`; the steps are sites and files.

    Returns:
        A `FileMergeReport`.

    Raises:
        LoadError: an adapter does not fit the base.
        PlanError: one problem for each site with a rule that can't be merged.
        MergeError: the base is quantised (see `quantised`), or an adapter changes the model's structure.
        SurgeryError: files of the base are absent or damaged, or the folder is not empty. No folder is made.

    Notes:
        Adapters that change the base's weights when they are loaded (PiSSA) keep the changed weights in memory.
        Tensors keep the dtype of the files also where `config.json` names another one, to which `from_pretrained`
        would convert them.
    """
    base, out = Path(base_folder), Path(out_folder)
    sources = [adapter] if isinstance(adapter, (str, Path)) or not isinstance(adapter, Sequence) else [*adapter]
    check_arguments(base, out, sources, dtype, keep_record, weights, workers)
    names = names_of(sources)
    with neutral(None), torch.no_grad():
        plan = plan_merge(base, sources, names, weights, model, untie, same_base, trust, keep_record, quantised)
        files = plan.files
        owners = Owners(plan.skeleton.model)
        run = partial(
            merge_unit, skeleton=plan.skeleton, files=files, owners=owners, untie=untie, record=keep_record, wide=dtype
        )
        tasks = [Task(unit.disk, partial(run, unit)) for unit in plan.units]
        added = {g.disk[0]: g.source.disk[0] for g in plan.skeleton.names.groups if g.source is not None}
        dtypes = new_dtypes(files, plan.skeleton, added, dtype)
        if plan.dequantised:
            dtypes = plain_dtypes(files, dtypes, dtype)
        job = Rewriting(files, tasks, dtypes, added, keep_record)
        texts = _changed_texts(plan, job, dtype)
        options = [str(dtype), keep_record, untie, list(weights or ()), texts, quantised]
        with open_ledger(out) as ledger:
            ledger.start([files.identity(), [_identity(source) for source in sources], options, _versions()])
            reused = rewrite_shards(job, ledger, workers, progress, f"merge {', '.join(names)}")
            left_out = _write_rest(plan, job, ledger, texts)
            if keep_record:
                _write_list(plan, job, ledger, texts)
            ledger.finish()
    lines = ledger.done
    renamed = job.shard_names()
    return FileMergeReport(
        out,
        tuple(names),
        len(plan.sites),
        tuple(renamed.values()),
        tuple(renamed[name] for name in reused),
        sum(line.get("nbytes", 0) for line in lines.values()),
        {name: line["base"] for name, line in lines.items() if "base" in line},
        tuple(left_out),
        tuple(plan.loaded),
    )


def _changed_texts(plan: MergePlan, job: Rewriting, dtype: torch.dtype | None) -> dict[str, str]:
    """The contents of the configuration and of the index, where they are not those of the base."""
    texts: dict[str, str] = {}
    config = read_config(plan.files.folder)
    if plan.untied:
        config = untied_config(config, plan.skeleton.model)
    if dtype is not None:
        config = config_with_dtype(config, dtype)
    if plan.dequantised:
        config = plain_config(config)
    if (plan.untied or plan.dequantised or dtype is not None) and config:
        texts[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    index = None if job.same_names else job.index()
    if index is not None:
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return texts


def _write_rest(plan: MergePlan, job: Rewriting, ledger: Ledger, texts: dict[str, str]) -> list[str]:
    """Writes the index, the configuration and the other files."""
    for name, text in texts.items():
        (ledger.files / name).write_text(text, encoding="utf-8")
    files = plan.files
    if files.index is not None and files.index not in texts and job.same_names:
        (ledger.files / files.index).write_bytes((files.folder / files.index).read_bytes())
    own = {*files.shards, *filter(None, [files.index]), *([FOLDER] if job.record else ())}
    return copy_other_files(files.folder, ledger.files, {*texts, *own})


def _write_list(plan: MergePlan, job: Rewriting, ledger: Ledger, texts: dict[str, str]) -> None:
    """Writes the description of the records."""
    shards = {}
    for name, shard in plan.files.shards.items():
        line = ledger.done[name]
        shards[name] = {"base": line["base"], "folds": line["folds"]}
        if not job.same_names:
            shards[name]["head"] = shard.head.hex()
    folder = plan.files.folder
    old = {name: (folder / name).read_bytes().decode() for name in texts}  # with the ends of lines as they are
    folded = [fold["tensor"] for facts in shards.values() for fold in facts["folds"]]
    twins = {name: plan.skeleton.twins[name] for name in folded if name in plan.skeleton.twins}
    data = {"format": FORMAT, "version": VERSION, "shards": shards, "files": old, "twins": twins}
    (ledger.files / FOLDER / LIST).write_text(json.dumps(data), encoding="utf-8")
    if (folder / FOLDER / LIST).is_file():  # the base is a merge itself
        copy_folder(folder / FOLDER, ledger.files / FOLDER / EARLIER)


def _identity(source: Any) -> Any:
    """What tells an adapter from another one: the contents of its files."""
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or not path.exists():
        return str(source)
    inside = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, checksum_of(file)] for file in inside]


def _versions() -> list[str]:
    return [surgery.__version__, torch.__version__, platform.machine()]
