"""Writes a checkpoint shard by shard: changed tensors are computed, all others copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.arithmetic.corrections import Record
from surgery.checkpoints.checkpoint_files import CheckpointFiles, StoredTensor
from surgery.checkpoints.dequantised_files import DequantisedShard
from surgery.checkpoints.ledger import Ledger
from surgery.checkpoints.merge_record import FOLDER, RecordWriter
from surgery.checkpoints.shard_layout import ShardLayout, code_of, layout_like, layout_of_head, new_layout
from surgery.checkpoints.shard_writing import ShardWriter, checksum_of, sha256_of, shard_checksum
from surgery.progress import Progress, steps

__all__ = ["Rewriting", "Task", "rewrite_shards"]


@dataclass(frozen=True)
class Task:
    """Work on some tensors of the files. `run` returns the new ones by name, and records of folds by their names.

    `disk`: the names of the tensors that may change.
    """

    disk: tuple[str, ...]
    run: Callable[[], tuple[dict[str, Tensor], Sequence[tuple[str, Record]]]]


@dataclass
class Rewriting:
    """What to write.

    Attributes:
        files: The checkpoint to read.
        tasks: The work; each name belongs to one task at most.
        dtypes: The dtype of each tensor that gets another one.
        added: For tensors that are not in the files, the name of the tensor whose value they start with.
        record: Whether the records of folds are written.
        strong: Whether the checksums of shards are SHA-256.
        heads: The bytes before the data of shards that get other ones, with other tensors.
    """

    files: CheckpointFiles
    tasks: Sequence[Task]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    record: bool = False
    strong: bool = False
    heads: Mapping[str, bytes] = field(default_factory=dict)

    def shard_names(self) -> dict[str, str]:
        """The name of each new shard by that of the old one."""
        return {name: _new_name(name) for name in self.files.shards}

    def keys(self, shard: str) -> list[str]:
        """The names of the tensors in a new shard."""
        return list(self.files.shards[shard].tensors) + [
            key for key, source in self.added.items() if self.files.shard_of[source] == shard
        ]

    def index(self) -> dict[str, Any] | None:
        """The contents of the new index; None for a single file."""
        if self.files.index is None:
            return None
        data = read_json(self.files.folder / self.files.index, LARGE)
        names = self.shard_names()
        total = sum(place.nbytes for shard in names for place in self.layout(shard).tensors.values())
        mapping = {key: names[shard] for shard in names for key in self.keys(shard)}
        metadata = data.get("metadata")
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        return {"metadata": metadata, "weight_map": dict(sorted(mapping.items()))}

    @property
    def same_names(self) -> bool:
        """Whether the new files have the tensors of the old ones, with the same sizes."""
        return not (self.dtypes or self.added or self.heads or self.files.pickled)

    def layout(self, name: str) -> ShardLayout:
        shard = self.files.shards[name]
        if name in self.heads:
            return layout_of_head(self.heads[name])
        keys = self.keys(name)
        same = keys == list(shard.tensors) and not isinstance(shard, DequantisedShard)
        if shard.pickle is None and same and not any(key in self.dtypes for key in keys):
            return layout_like(shard)
        places = sorted(keys, key=lambda key: self._place(key).start if key in shard.tensors else 1 << 62)
        tensors = [(key, self._code(key), self._place(key).shape) for key in places]
        return new_layout(tensors, {key: self._place(key).nbytes for key in keys}, shard.metadata)

    def _place(self, key: str) -> StoredTensor:
        return self.files.tensors[self.added.get(key, key)]

    def _code(self, key: str) -> str:
        return code_of(self.dtypes[key]) if key in self.dtypes else self._place(key).code


def _new_name(name: str) -> str:
    if name.endswith(".safetensors"):
        return name
    return "model" + name.removeprefix("pytorch_model").removesuffix(".bin") + ".safetensors"


def rewrite_shards(job: Rewriting, ledger: Ledger, workers: int, progress: Progress, what: str) -> list[str]:
    """Writes the shards that the ledger does not have. Returns the names of the others, whose checksums are right."""
    layouts = {name: job.layout(name) for name in job.files.shards}
    reused = [name for name, layout in layouts.items() if _is_finished(job, ledger, name, layout)]
    shard_of = {key: name for name, layout in layouts.items() for key in layout.tensors}
    tasks_of: dict[str, list[Task]] = {name: [] for name in layouts}
    for task in job.tasks:
        for name in dict.fromkeys(shard_of[key] for key in task.disk if key in shard_of):
            tasks_of[name].append(task)
    total = sum(len(tasks_of[name]) + 1 for name in layouts)
    if job.record:
        (ledger.files / FOLDER).mkdir(exist_ok=True)
    with steps(progress, what, total) as step, _pool(workers) as run_all:
        for name in layouts:
            if name in reused:
                for _ in range(len(tasks_of[name]) + 1):
                    step()
            else:
                ledger.add(_write_shard(job, ledger, name, layouts[name], tasks_of[name], run_all, step))
    return reused


def _write_shard(
    job: Rewriting,
    ledger: Ledger,
    name: str,
    layout: ShardLayout,
    tasks: Sequence[Task],
    run_all: Callable[[Sequence[Callable[[], None]], Callable[[], None]], None],
    step: Callable[[], None],
) -> dict[str, Any]:
    path = ledger.files / job.shard_names()[name]
    writer, folds = ShardWriter(path, layout), list[dict[str, Any]]()
    records = RecordWriter(ledger.files / FOLDER / f"{path.name}.record") if job.record else None

    def work(task: Task) -> None:
        tensors, made = task.run()
        for key, tensor in tensors.items():
            if key in layout.tensors:
                writer.write(key, tensor.to(job.dtypes.get(key, tensor.dtype)))
        if records is not None and any(key in layout.tensors for key in task.disk[:1]):
            folds.extend({"tensor": key, **records.write(record)} for key, record in made)

    run_all([lambda task=task: work(task) for task in tasks], step)
    _copy_rest(job, name, writer)
    written = writer.finish()
    step()
    line: dict[str, Any] = {"shard": name, "checksum": sha256_of(path) if job.strong else written}
    if records is not None:
        base = sha256_of(job.files.shards[name].path)
        line |= {"folds": folds, "nbytes": records.nbytes, "record": checksum_of(records.path), "base": base}
    return line


def _copy_rest(job: Rewriting, name: str, writer: ShardWriter) -> None:
    """Writes the tensors of a shard that no task changed."""
    shard, rest = job.files.shards[name], [key for key in writer.layout.tensors if key not in writer.checksums]
    plain = [key for key in rest if key not in job.dtypes and shard.pickle is None]
    writer.copy(shard.path, [(key, shard.tensors[job.added.get(key, key)].start) for key in plain])
    for key in rest:
        if key not in writer.checksums:
            tensor = shard.read(job.added.get(key, key))
            writer.write(key, tensor.to(job.dtypes.get(key, tensor.dtype)))


def _is_finished(job: Rewriting, ledger: Ledger, name: str, layout: ShardLayout) -> bool:
    """Whether a shard is in the ledger and has its checksum."""
    line, path = ledger.done.get(name), ledger.files / job.shard_names()[name]
    if line is None or not path.is_file():
        return False
    if job.record:
        record = ledger.files / FOLDER / f"{path.name}.record"
        if not record.is_file() or checksum_of(record) != line["record"]:
            return False
    return (sha256_of(path) if job.strong else shard_checksum(path, layout)) == line["checksum"]


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Sequence[Callable[[], None]], Callable[[], None]], None]]:
    """Yields a function that runs works and calls a step after each: in this thread, or in several."""
    if workers <= 1:

        def in_turn(works: Sequence[Callable[[], None]], step: Callable[[], None]) -> None:
            for work in works:
                work()
                step()

        yield in_turn
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:

        def side_by_side(works: Sequence[Callable[[], None]], step: Callable[[], None]) -> None:
            futures = [pool.submit(work) for work in works]
            try:
                for future in as_completed(futures):
                    future.result()
                    step()
            finally:
                for future in futures:
                    future.cancel()

        yield side_by_side
