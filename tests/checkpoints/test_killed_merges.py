"""Merges into files that are killed lose nothing, and damaged files are refused. `make damage` runs 200 kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import MergeError, SurgeryError, apply_rules, merge_files, save_adapter, unmerge_files
from surgery.checkpoints import shard_rewriting
from surgery.rules import LoraRule
from tests.support.checkpoints import contents, kill_merges, meta, stack, write_sharded

ALL = bool(os.environ.get("ALL_DAMAGE"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))
KILLS = 200 if ALL else 3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in six files, with an adapter beside it."""
    model = stack()
    write_sharded(model, tmp_path / "base")
    apply_rules(model, LoraRule("all-linear", rank=2, init="random"))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base"


def merged(base: Path, name: str = "merged", **options: Any) -> Any:
    return merge_files(base, base.parent / "adapter", base.parent / name, model=meta(), **options)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_merges_lose_nothing(base: Path) -> None:
    """After each kill the result is absent or complete, and the same run goes on."""
    folder = base.parent
    merged(base, "expected", keep_record=True)
    expected, before = contents(folder / "expected"), contents(base)
    stages: dict[str, int] = dict.fromkeys(("nothing", "partly", "merged", "restored"), 0)

    def seen() -> None:
        out, back = folder / "out", folder / "back"
        assert contents(base) == before
        if out.exists():
            assert contents(out) == expected
        if back.exists():
            assert contents(back) == before
            shutil.rmtree(back)
            shutil.rmtree(out)
            stages["restored"] += 1
        elif out.exists():
            stages["merged"] += 1
        else:
            stages["partly" if (folder / ".out.unfinished").exists() else "nothing"] += 1

    killed = kill_merges(base, folder / "adapter", folder / "out", folder / "back", KILLS, seen, random.Random(SEED))
    assert killed == KILLS
    if ALL:
        assert min(stages["partly"], stages["merged"], stages["restored"]) > KILLS / 50, stages
        print(f"{killed} kills: {stages}")


class Stopped(BaseException):
    """What stops a run in a test, as Ctrl-C does."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the next run stop before it writes the shard of this number."""
    write = shard_rewriting._write_shard

    def stop(number: int) -> None:
        count = iter(range(number))

        def until(*args: Any) -> Any:
            if next(count, None) is None:
                monkeypatch.setattr(shard_rewriting, "_write_shard", write)
                raise Stopped
            return write(*args)

        monkeypatch.setattr(shard_rewriting, "_write_shard", until)

    return stop


def test_a_run_goes_on_where_it_stopped(base: Path, stop_at: Callable[[int], None]) -> None:
    merged(base, "expected", keep_record=True)
    stop_at(4)
    with pytest.raises(Stopped):
        merged(base, keep_record=True)
    assert not (base.parent / "merged").exists()
    unfinished = base.parent / ".merged.unfinished"
    names = sorted(file.name for file in (unfinished / "files").glob("model*"))
    assert len(names) == 4
    spoiled = unfinished / "files" / names[1]
    data = bytearray(spoiled.read_bytes())
    data[-1] ^= 1
    spoiled.write_bytes(data)
    with open(unfinished / "ledger.jsonl", "a") as file:
        file.write('{"shard": "mod')  # cut off by the kill
    steps: list[int] = []
    report = merged(base, keep_record=True, progress=lambda what, done, total: steps.append(done))
    assert report.reused == (names[0], names[2], names[3])
    assert steps == list(range(len(steps)))
    assert contents(base.parent / "merged") == contents(base.parent / "expected")
    assert not unfinished.exists()


def test_a_run_with_other_arguments_begins_anew(base: Path, stop_at: Callable[[int], None]) -> None:
    stop_at(4)
    with pytest.raises(Stopped):
        merged(base)
    assert not merged(base, weights=[0.5]).reused

    stop_at(3)
    with pytest.raises(Stopped):
        merged(base, "again")
    changed = stack()
    apply_rules(changed, LoraRule("all-linear", rank=1, init="random"))
    save_adapter(changed, base.parent / "adapter")
    assert not merged(base, "again").reused


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_runs_at_once(base: Path) -> None:
    from surgery.checkpoints.ledger import open_ledger

    with open_ledger(base.parent / "merged"), pytest.raises(SurgeryError, match="another process"):
        merged(base)
    merged(base)


def test_damaged_bases_are_refused(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = base / "model-00002-of-00006.safetensors"
    content = shard.read_bytes()

    def refused(text: str) -> None:
        with pytest.raises(SurgeryError, match=text):
            merged(base)
        assert not (base.parent / "merged").exists() and not list(base.parent.glob(".*"))

    shard.write_bytes(content[:-3])
    refused("damaged")
    shard.write_bytes(content[:5])
    refused("damaged")
    shard.write_bytes(content + b"more")
    refused("its tensors end at byte")
    shard.unlink()
    refused("are absent")
    shard.write_bytes(content)
    for mapping, text in (
        ({**good["weight_map"], "9.weight": shard.name}, "does not contain it"),
        ({**good["weight_map"], "0.weight": "../x.safetensors"}, "outside of its folder"),
        ({**good["weight_map"], "0.weight": 3}, "weight_map"),
        ([], "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": mapping}))
        refused(text)
    index.write_text("{")
    refused("JSON|can't be read|damaged")
    index.write_text(json.dumps(good))
    merged(base)


def test_random_damage_of_a_shard(base: Path) -> None:
    """A damaged header is refused, or the tensors are those that it describes."""
    chance, shard = random.Random(SEED), base / "model-00003-of-00006.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for number in range(300 if ALL else 8):
        data = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(8 + length)] = chance.randrange(256)
        shard.write_bytes(data)
        try:
            merged(base, f"out{number}")
            shutil.rmtree(base.parent / f"out{number}")
        except SurgeryError:
            assert not (base.parent / f"out{number}").exists()


def test_weights_that_changed_since_the_merge(base: Path) -> None:
    merged(base, keep_record=True)
    folder = base.parent / "merged"
    shard = folder / "model-00002-of-00006.safetensors"
    content = shard.read_bytes()
    data = bytearray(content)
    data[-1] ^= 1  # of a bias or a weight: the last tensor
    shard.write_bytes(data)
    with pytest.raises(MergeError):
        unmerge_files(folder, base.parent / "back", model=meta())
    assert not (base.parent / "back").exists()
    shard.write_bytes(content)
    restored = unmerge_files(folder, base.parent / "back", model=meta(), workers=2)
    assert contents(base.parent / "back") == contents(base) and len(restored.shards) == 6


def test_damaged_records_are_refused(base: Path) -> None:
    merged(base, keep_record=True)
    folder = base.parent / "merged"
    place = folder / "merge_record" / "record.json"
    good = json.loads(place.read_text())
    chance = random.Random(SEED)

    def refused(data: Any, text: str) -> None:
        place.write_text(json.dumps(data))
        with pytest.raises(SurgeryError, match=text):
            unmerge_files(folder, base.parent / "back", model=meta())
        assert not (base.parent / "back").exists()

    refused({**good, "version": 2}, "version 2")
    refused({**good, "format": "x"}, "damaged")
    refused({**good, "shards": {**good["shards"], "../x": {"base": "", "folds": []}}}, "outside")
    refused({**good, "shards": {**good["shards"], "x": {}}}, "does not describe")
    name = next(iter(good["shards"]))
    for _ in range(100 if ALL else 3):
        folds = json.loads(json.dumps(good["shards"][name]["folds"]))
        fold = chance.choice(folds)
        fold[chance.choice(sorted(fold))] = chance.choice([None, 7, "x", [], {}, [[1, 2]]])
        refused({**good, "shards": {**good["shards"], name: {**good["shards"][name], "folds": folds}}}, ".")
    place.write_text(json.dumps(good))
    record = folder / "merge_record" / f"{name}.record"
    record.write_bytes(record.read_bytes()[:-5])
    refused(good, "damaged")
    shutil.rmtree(folder / "merge_record")
    with pytest.raises(SurgeryError, match="keep_record=True"):
        unmerge_files(folder, base.parent / "back", model=meta())


def test_torch_is_asked_for_no_gradients(base: Path) -> None:
    """The caller's modes have no effect."""
    merged(base, "plain")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        merged(base, "inside")
    assert contents(base.parent / "plain") == contents(base.parent / "inside")
