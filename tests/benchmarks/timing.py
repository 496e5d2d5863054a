"""Interleaved timing: every candidate runs once a round, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """The device, the rounds of each measurement, and the seconds that a sample should last."""

    device: str = "cpu"
    rounds: int = 15
    sample: float = 0.02
    quick: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass
class Times:
    """Seconds of each candidate, round by round."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, candidate: str, other: str) -> float:
        """The median over rounds of the ratio of two candidates' times in the same round."""
        return statistics.median(a / b for a, b in zip(self.rounds[candidate], self.rounds[other], strict=True))

    def seconds(self, name: str) -> float:
        return statistics.median(self.rounds[name])


def interleaved(setting: Setting, works: Mapping[str, Work], repeat: int | None = None) -> Times:
    """Run all candidates in turn, `setting.rounds` times, after a warm-up. `repeat`: how many calls make one sample."""
    counts = {}
    for name, work in works.items():
        work()
        spent = _seconds(setting, work, 1)
        counts[name] = repeat or max(1, round(setting.sample / max(spent, 1e-9)))
    return collected(works, setting.rounds, lambda name: _seconds(setting, works[name], counts[name]) / counts[name])


def collected(names: Iterable[str], rounds: int, measure: Callable[[str], float]) -> Times:
    """`rounds` rounds of one measurement of each name, with the order turned around every second round."""
    names = list(names)
    times = Times({name: [] for name in names})
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            times.rounds[name].append(measure(name))
    return times


def _seconds(setting: Setting, work: Work, count: int) -> float:
    gc.collect() if count == 1 else None
    if setting.cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    # One thread does all the work, and other programs' turns on its core are none of it: CPU time, not the clock's.
    begin = time.process_time()
    for _ in range(count):
        work()
    return time.process_time() - begin


def once(work: Work) -> float:
    """CPU seconds of one call."""
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def process_seconds(code: str, cache: str) -> float:
    """CPU seconds, user and system, of a fresh Python process that runs `code`, its bytecode kept under `cache`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{code!r} failed in a fresh process")
    return usage.ru_utime + usage.ru_stime
