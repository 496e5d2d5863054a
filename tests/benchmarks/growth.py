"""The lines of the table on growth: how a verb's time grows with layers and with unrelated adapters."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from surgery import merge, unmerge
from tests.benchmarks import models, verbs
from tests.benchmarks.lines import Row, bases
from tests.benchmarks.models import disturb, theirs, twin
from tests.benchmarks.timing import Setting, interleaved

Seconds = dict[str, dict[int, float]]  # by verb and size


def growth(setting: Setting) -> Iterator[Row]:
    layers = (2, 4, 8) if setting.quick else (32, 128, 512)
    counts = (1, 3) if setting.quick else (1, 10, 100, 300)
    rounds = 1 if setting.quick else 2
    spent = _spent({size: verbs.build_layers(size, 2) for size in layers}, rounds)
    bare = _of_bare(layers, rounds)
    beside = {verb: {n: spent[verb][n] / at[n] for n in at} for verb, at in bare.items()}
    alone = {verb: at for verb, at in spent.items() if verb not in bare}
    yield from _rows("layers", alone, dict.fromkeys(alone, 1.05))
    yield from _rows("layers, as a ratio to the bare model", beside, dict.fromkeys(beside, 0.05))
    spent = _spent({size: verbs.build_layers(2 if setting.quick else 4, size) for size in counts}, rounds)
    yield from _rows("adapters", spent, {verb: 1.05 if verb in verbs.WHOLE else 0.1 for verb in spent})
    size, width = layers[-1], 64
    mine, their = models.ours(verbs.Layers(size, width)), theirs(verbs.Layers(size, width))
    disturb(mine)
    disturb(their)

    with torch.no_grad():
        ratios = []
        for _ in range(1 if setting.quick else 5):
            ratios.append(_once(partial(merge, mine)) / _once(their.merge_adapter))
            unmerge(mine)
            their.unmerge_adapter()
    work = f"merge in record mode, {size} layers of 7 Linears, {width} wide"
    yield Row(work, "PEFT", 2.0, min(ratios), 1.0)


def _rows(of: str, spent: Seconds, aims: dict[str, float]) -> Iterator[Row]:
    """Fit the exponent of each verb by least squares; yield a row for the largest per aim, and for each that misses."""
    exponents = {verb: growth_exponent(at) for verb, at in spent.items()}
    for aim in dict.fromkeys(aims.values()):
        of_this = {verb: exponent for verb, exponent in exponents.items() if aims[verb] == aim}
        worst = max(of_this, key=lambda verb: of_this[verb])
        sizes = " / ".join(map(str, spent[worst]))
        yield Row(f"growth with {sizes} {of}, the largest of {len(of_this)} verbs' exponents: {worst}", "", aim,
                  of_this[worst])  # fmt: skip
        for verb, exponent in of_this.items():
            if exponent > aim and verb != worst:
                yield Row(f"growth with {sizes} {of}: {verb}", "", aim, exponent)


def growth_exponent(at: dict[int, float]) -> float:
    """The exponent of seconds that grow with a size: the slope through their logarithms by least squares."""
    x, y = [math.log(size) for size in at], [math.log(max(seconds, 1e-9)) for seconds in at.values()]
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def _spent(models: dict[int, verbs.Layers], rounds: int) -> Seconds:
    """CPU seconds of each verb at each size, the least of some rounds after one that is not counted."""
    best: Seconds = {}
    for index in range(rounds + 1):
        for size, model in models.items():
            with TemporaryDirectory() as folder:
                for verb, work in verbs.steps(model, Path(folder)):
                    seconds = _once(work)
                    if verb and index:
                        at = best.setdefault(verb, {})
                        at[size] = min(at.get(size, seconds), seconds)
    return best


def _of_bare(layers: tuple[int, ...], rounds: int) -> Seconds:
    """The same for a model without adapters, which measures Python's and torch's own part."""
    best: Seconds = {}
    for _ in range(rounds + 1):
        for size in layers:
            for verb, work in verbs.steps_of_any(verbs.Layers(size, 16)):
                seconds, at = _once(work), best.setdefault(verb, {})
                at[size] = min(at.get(size, seconds), seconds)
    best["prepare slots"] = best["prepare constant"]  # there are no slots without adapters; the copy is the same
    return best


def _once(work: Callable[[], object]) -> float:
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compiled(setting: Setting) -> Iterator[Row]:
    """A training step, compiled: the same model, ours and PEFT's, each beside the compiled base."""
    for name, base in bases(setting, models.compiled_llama):
        embedding: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
        ids = torch.randint(0, 1000, (4, 128), device=setting.device)
        embeddings = embedding(ids).detach().requires_grad_(True)
        candidates = {"base": twin(base), "ours": models.ours(twin(base)), "peft": theirs(twin(base))}
        works = {}
        for key, model in candidates.items():
            disturb(model.train())
            works[key] = partial(_step, torch.compile(model), model, embeddings)
        times = interleaved(setting, works)
        ratios = times.ratio("ours", "base"), times.ratio("peft", "base")
        yield Row(f"training step, compiled: {name}", "compiled base", 1.25, *ratios, below_peft=True)


def _step(run: Callable[..., object], model: nn.Module, embeddings: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    embeddings.grad = None
    run(inputs_embeds=embeddings).last_hidden_state.square().mean().backward()  # type: ignore[attr-defined]


LINES: dict[str, Callable[[Setting], Iterator[Row]]] = {"growth": growth, "compiled": compiled}
