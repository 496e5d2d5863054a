"""Several processes that save one adapter: the first writes, the others look whether what it wrote is theirs, too.

The first waits for none of them, so it may also save alone. They tell each other over the process group's store, which
needs no collective.
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
    """A block in which this process writes the tensors of these keys into a folder, if it is to (given as a bool).

    `SurgeryError` where processes would have different tensors written to one folder, as the stages of a pipeline
    would; and on a process that is not the first, where the first does not save there.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not several:
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
    done = "no"
    try:
        yield rank == 0
        done = "yes"
    finally:
        if rank == 0:
            store.set(f"{name}/written", done)
    if rank != 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"{name}/written"], PATIENCE)
            done = store.get(f"{name}/written").decode()
        if done != "yes" or not store.check([f"{name}/written"]):
            raise SurgeryError(f"the adapter was not saved in {folder}", why="process 0, which writes, failed")


def _compare(mine: Collection[str], theirs: Collection[str], other: int, folder: Path) -> None:
    if set(mine) != set(theirs):
        elsewhere, here = sorted(set(theirs) - set(mine)), sorted(set(mine) - set(theirs))
        differences = [f"process {other} has {abbreviate(elsewhere, 'tensors')}" if elsewhere else ""]
        differences += [f"this one has {abbreviate(here, 'tensors')}" if here else ""]
        raise SurgeryError(
            f"{folder} would hold a part of the adapter as if it were all",
            why=f"processes have different parts of the model: {'; '.join(filter(None, differences))}",
            fix="save each part in a folder of its own with state_dict=…, this process's model.state_dict(); or gather "
            "all parts' tensors, and save them from one model that has all modules",
        )
