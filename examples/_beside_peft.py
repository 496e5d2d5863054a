"""Times work with many adapters in this library and in PEFT, from the same files: a table for many.py."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from _common import shown

if TYPE_CHECKING:
    from torch import Tensor

WORKS = {
    "load": "load the five",
    "switch": "switch to another",
    "first": "enter a block, and its first batch: ten rows, five adapters",
    "rows": "each further batch in the block",
    "add": "load one more",
}


def timed(plain: Any, home: Path, topics: list[str], batch: dict[str, Any], rounds: int) -> float | None:
    """Print the times of both libraries, one thread each, and the largest difference of their scores for one batch."""
    import torch

    names = topics * 2
    some = {key: batch[key][: len(names)] for key in ("input_ids", "attention_mask")}
    ours = Ours(plain, home, topics)
    theirs = None if find_spec("peft") is None else Theirs(plain, home, topics)
    rows, used = [], [library for library in (ours, theirs) if library is not None]
    with torch.inference_mode():
        difference = None if theirs is None else (ours.rows(some, names) - theirs.rows(some, names)).abs().max().item()
        for work in WORKS:
            spent = [[] for _ in used]
            for _ in range(rounds):
                for library, seconds in zip(used, spent, strict=True):
                    seconds.append(getattr(library, f"timed_{work}")(some, names))
            rows.append([WORKS[work], *(f"{1000 * median(seconds):.2f} ms" for seconds in spent)])
            if theirs is not None:
                rows[-1].append(f"{median(a / b for a, b in zip(*spent, strict=True)):.3f}")
        base = median(seconds_of(lambda: plain(**some)) for _ in range(rounds))
    rows.append(["the same batch, through the bare model", f"{1000 * base:.2f} ms", *[""] * (len(rows[0]) - 2)])
    if theirs is None:
        print("PEFT is not installed (pip install peft): its column is left out")
    shown(["CPU time, median", "surgery", *["PEFT", "surgery / PEFT"] * (theirs is not None)], rows)
    if difference is not None:
        print(f"both libraries' scores of that batch differ by at most {difference:.1e}")
    return difference


def seconds_of(work: Callable[[], Any]) -> float:
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


class Ours:
    """Run the work with this library; return its seconds by name."""

    def __init__(self, plain: Any, home: Path, topics: list[str]):
        self.plain, self.home, self.topics, self.turns = plain, home, topics, cycle(topics)
        self.timed_load()

    def timed_load(self, *_: Any) -> float:
        from surgery import load_adapters

        self.model = copy.deepcopy(self.plain)
        return seconds_of(lambda: load_adapters(self.model, self.home, live=self.topics[0]))

    def timed_switch(self, *_: Any) -> float:
        from surgery import activate

        return seconds_of(lambda: [activate(self.model, next(self.turns)) for _ in range(20)]) / 20

    def rows(self, some: dict[str, Any], names: list[str]) -> Tensor:
        from surgery import route

        with route(self.model, names):
            return self.model(**some).logits

    def timed_first(self, some: dict[str, Any], names: list[str]) -> float:
        return seconds_of(lambda: self.rows(some, names))

    def timed_rows(self, some: dict[str, Any], names: list[str]) -> float:
        from surgery import route

        with route(self.model, names):
            self.model(**some)
            return seconds_of(lambda: self.model(**some))

    def timed_add(self, *_: Any) -> float:
        from surgery import deactivate, load_adapter, remove

        deactivate(self.model)  # two heads can't be live together
        spent = seconds_of(lambda: load_adapter(self.model, self.home / self.topics[-1], "more"))
        remove(self.model, "more")
        return spent


class Theirs:
    """Run the same work with PEFT."""

    def __init__(self, plain: Any, home: Path, topics: list[str]):
        self.plain, self.home, self.topics, self.turns = plain, home, topics, cycle(topics)
        self.timed_load()

    def timed_load(self, *_: Any) -> float:
        plain = copy.deepcopy(self.plain)
        return seconds_of(lambda: self._load(plain))

    def _load(self, plain: Any) -> None:
        from peft import PeftModel

        first, *others = self.topics
        self.model = PeftModel.from_pretrained(plain, str(self.home / first), adapter_name=first).eval()
        for topic in others:
            self.model.load_adapter(str(self.home / topic), adapter_name=topic)

    def timed_switch(self, *_: Any) -> float:
        return seconds_of(lambda: [self.model.set_adapter(next(self.turns)) for _ in range(20)]) / 20

    def rows(self, some: dict[str, Any], names: list[str]) -> Tensor:
        return self.model(**some, adapter_names=names).logits

    def timed_rows(self, some: dict[str, Any], names: list[str]) -> float:
        return seconds_of(lambda: self.rows(some, names))

    timed_first = timed_rows  # PEFT has no block for this

    def timed_add(self, *_: Any) -> float:
        spent = seconds_of(lambda: self.model.load_adapter(str(self.home / self.topics[-1]), adapter_name="more"))
        self.model.delete_adapter("more")
        return spent
