"""Damaged files are refused or loaded whole; killed saves leave the old adapter or the new one. A sample of both;
`make damage` runs 10,000 files and 200 kills, with another DAMAGE_SEED others."""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from surgery import SurgeryError, adapter_state_dict, load_adapter, remove, rules_of
from surgery.testing import Snapshot
from tests.support import damage

ALL = bool(os.environ.get("ALL_DAMAGE"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))
FILES, KILLS = (10_000, 200) if ALL else (300, 20)
MOST_SECONDS, MOST_BYTES = 2.0, 200 << 20


def test_a_damaged_file_is_refused_or_loaded_whole(tmp_path: Path) -> None:
    originals = damage.originals(tmp_path)
    model = damage.model()
    before = Snapshot(model)
    chance, outcomes, slowest, peak = random.Random(SEED), {"refused": 0, "loaded": 0}, 0.0, memory()
    for number in range(FILES):
        kind = chance.choice(sorted(originals))
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        for name, content in damage.damaged(originals[kind], chance).items():
            (folder / name).write_bytes(content)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_adapter(model, folder, strict=chance.random() < 0.8)
            outcomes["loaded"] += 1
            assert all(
                bool(torch.isfinite(t).all()) for t in adapter_state_dict(model).values() if t.is_floating_point()
            )
            remove(model)
        except SurgeryError:
            outcomes["refused"] += 1
        slowest = max(slowest, time.process_time() - start)
        assert not before.differences(model), f"{number}: {kind}"
        for file in folder.iterdir():
            file.unlink()
    assert min(outcomes.values()) > FILES / 50, outcomes
    if ALL:  # figures of a sample say little on a busy machine
        assert slowest < MOST_SECONDS and memory() - peak < MOST_BYTES, (slowest, memory() - peak)
        print(f"{FILES} files: {outcomes}, {slowest:.2f} s at most, {(memory() - peak) >> 20} MB")


def memory() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_save_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    folder, seen = tmp_path / "adapter", []

    def look(folder: Path) -> None:
        model = damage.model()
        load_adapter(model, folder)
        values = {float(value) for tensor in adapter_state_dict(model).values() for value in tensor.unique()}
        (rule,) = rules_of(model)
        assert values == {rule.alpha}  # type: ignore[attr-defined]  # the tensors and the rule are of one save
        seen.append(sorted(file.name for file in folder.iterdir()))

    damage.kill_saves(folder, KILLS, look, random.Random(0))
    assert len(seen) == KILLS
    if ALL:
        half = sum(any(name.startswith(".surgery") for name in names) for names in seen)
        print(f"{KILLS} kills, {half} in the middle of a save")
