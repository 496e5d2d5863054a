"""Trainer's runs with three adapters on one model, interrupted and resumed: the bits of the uninterrupted run.

`make crashes` runs CRASHES of each kind, of which `make test` runs a few."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
crashes: Any = pytest.importorskip("tests.support.crashes")

CRASHES = int(os.environ.get("CRASHES", "2"))
SEED = int(os.environ.get("CRASH_SEED", "0"))
SEEDS = 2 if CRASHES < 10 else 10


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, Any], float]]:
    """Uninterrupted runs by seed, and the last one's seconds."""
    runs = {}
    for seed in range(SEED, SEED + SEEDS):
        start = time.monotonic()
        runs[seed] = crashes.run(seed, tmp_path_factory.mktemp("whole")), time.monotonic() - start
    return runs


def same(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert actual["losses"] == wanted["losses"]
    assert actual["tensors"].keys() == wanted["tensors"].keys()
    assert not [name for name, tensor in wanted["tensors"].items() if not torch.equal(tensor, actual["tensors"][name])]


def test_what_trains_and_what_does_not(wholes: Any) -> None:
    for seed, (whole, _) in wholes.items():
        start = crashes.model(seed, True).state_dict()
        moved = {name for name, tensor in whole["tensors"].items() if not torch.equal(tensor, start[name])}
        assert moved == {name for name in start if ".adapters.live." in name}


def test_a_run_that_fails_and_goes_on(wholes: Any, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    crashed = 0
    for number in range(CRASHES):
        seed, folder = SEED + number % SEEDS, tmp_path / str(number)
        folder.mkdir()
        done = None
        while done is None:
            try:
                done = crashes.run(seed, folder, crashes.Crash(chance.randrange(4, 14)))
            except KeyboardInterrupt:
                crashed += 1
        same(done, wholes[seed][0])
    assert crashed >= CRASHES
    print(f"{CRASHES} runs failed {crashed} times")


def test_half_a_checkpoint_is_passed_over(wholes: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        crashes.run(SEED, tmp_path, crashes.Crash(9))
    assert crashes.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"best_global_step": nu')
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert crashes.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    same(crashes.run(SEED, tmp_path), wholes[SEED][0])
    assert crashes.last_checkpoint(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_that_is_killed_and_goes_on(wholes: Any, tmp_path: Path) -> None:
    chance, server = random.Random(SEED), crashes.Server()
    counts = {"killed": 0, "half": 0}
    try:
        for number in range(CRASHES):
            seed, folder = SEED + number % SEEDS, tmp_path / str(number)
            folder.mkdir()
            whole, seconds = wholes[seed]
            for key, count in crashes.killed_run(server, seed, folder, seconds, 3, chance).items():
                counts[key] += count
            same(torch.load(folder / "result.pt"), whole)
    finally:
        server.close()
    assert counts["killed"] >= CRASHES
    print(f"{CRASHES} runs killed {counts['killed']} times, {counts['half']} times with half a checkpoint")
