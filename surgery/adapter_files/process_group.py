"""Saving from several processes: the first writes, the others check that they have the same tensors.

The first process does not wait for the others, so it may also save alone. Processes communicate through the process
group's store, which needs no collective.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from surgery.errors import SurgeryError, abbreviate

__all__ = ["writing"]

PATIENCE = timedelta(seconds=120)
_times: Counter[str] = Counter()


@contextlib.contextmanager
def writing(folder: Path, keys: Collection[str]) -> Iterator[bool]:
    """Yields whether this process writes the tensors of these keys into the folder.

    Raises `SurgeryError` if processes have different tensors, such as stages of a pipeline; and on other processes, if
    the first process does not save into this folder.
    """
    distributed = torch.distributed
    has_other_processes = (
        distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    )
    if not has_other_processes:
        yield True
        return
    store: Any = distributed.distributed_c10d._get_default_store()
    rank = distributed.get_rank()
    name = f"surgery/{folder}/{_times[str(folder)]}"
    _times[str(folder)] += 1
    store.set(f"{name}/{rank}", json.dumps(sorted(keys)))
    if rank == 0:
        for other in range(1, distributed.get_world_size()):
            if store.check([f"{name}/{other}"]):
                _compare(keys, json.loads(store.get(f"{name}/{other}")), other, folder)
    else:
        try:
            store.wait([f"{name}/0"], PATIENCE)
        except RuntimeError:
            raise SurgeryError(
                f"the adapter was not saved: process 0, which writes, has not saved one in {folder}",
                fix="call save_adapter on every process with the same folder; or on this one alone with "
                "state_dict=…, the model's whole state dict",
            ) from None
        _compare(keys, json.loads(store.get(f"{name}/0")), 0, folder)
    written = "no"
    try:
        yield rank == 0
        written = "yes"
    finally:
        if rank == 0:
            store.set(f"{name}/written", written)
    if rank != 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"{name}/written"], PATIENCE)
            written = store.get(f"{name}/written").decode()
        if written != "yes" or not store.check([f"{name}/written"]):
            raise SurgeryError(f"the adapter was not saved in {folder}", why="process 0, which writes, failed")


def _compare(keys: Collection[str], other_keys: Collection[str], other: int, folder: Path) -> None:
    if set(keys) != set(other_keys):
        only_other, only_this = sorted(set(other_keys) - set(keys)), sorted(set(keys) - set(other_keys))
        differences = [f"process {other} has {abbreviate(only_other, 'tensors')}" if only_other else ""]
        differences += [f"this one has {abbreviate(only_this, 'tensors')}" if only_this else ""]
        raise SurgeryError(
            f"{folder} would contain only a part of the adapter",
            why=f"processes have different parts of the model: {'; '.join(filter(None, differences))}",
            fix="save each part in a separate folder with state_dict=…, this process's model.state_dict(); or gather "
            "all parts' tensors, and save them from one model that has all modules",
        )
