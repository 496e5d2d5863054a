"""The lines of the table on many adapters of one model: switching between them, and one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

from surgery import activate, route
from tests.benchmarks import models
from tests.benchmarks.lines import Row, bases
from tests.benchmarks.models import twin
from tests.benchmarks.timing import Setting, collected, interleaved, once


def switch(setting: Setting) -> Iterator[Row]:
    layers, count = (8, 4) if setting.quick else (128, 32)
    mine = models.many(models.Stack(layers, 16).to(setting.device), count)
    their = models.stack_of_theirs(layers, 16, count).to(setting.device)
    for index in range(count):  # what a first switch makes is kept
        activate(mine, f"a{index}")
    works = {"ours": _turns(partial(activate, mine), count), "peft": _turns(their.set_adapter, count)}
    times = interleaved(setting, works)
    work = f"switch to another of {count} adapters on {layers * 7} Linears (PEFT: {times.seconds('peft'):.2f} s)"
    yield Row(work, "PEFT", 0.01, times.ratio("ours", "peft"), 1.0, times.seconds("ours"))


def _turns(use: Callable[[str], Any], count: int) -> Callable[[], Any]:
    """To another adapter at each call."""
    names = cycle([f"a{index}" for index in range(count)])
    return lambda: use(next(names))


def rows(setting: Setting) -> Iterator[Row]:
    count = 4 if setting.quick else 32
    names = [f"a{index}" for index in range(count)]
    for name, base in bases(setting, models.llama, models.small_llama):
        mine, their = models.many(twin(base), count).eval(), models.many_of_theirs(twin(base), count).eval()
        token = torch.randint(0, 1000, (count, 1), device=setting.device)
        works = {
            "base": partial(base, input_ids=token),
            "ours": partial(mine, input_ids=token),
            "peft": partial(their, input_ids=token, adapter_names=names),
        }
        with torch.no_grad():
            with route(mine, names):
                times = interleaved(setting, works)
            work = f"{count} rows, an adapter each of rank 8, one token: {name}"
            ratios = times.ratio("ours", "base"), times.ratio("peft", "base")
            yield Row(work, "base", 1.3, *ratios, times.seconds("ours"))
            entered = collected(["ours"], setting.rounds, partial(_begun, mine, names, token))
        spent = entered.seconds("ours") - times.seconds("ours")
        yield Row(f"{count} rows, seconds to enter a block, its first token aside: {name}", "", 0.1, spent)


def _begun(model: nn.Module, names: list[str], token: torch.Tensor, _: str) -> float:
    """Seconds of a block and one token in it."""

    def work() -> None:
        with route(model, names):
            model(input_ids=token)

    return once(work)


LINES: dict[str, Callable[[Setting], Iterator[Row]]] = {"switch": switch, "rows": rows}
