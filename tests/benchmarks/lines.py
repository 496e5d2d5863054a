"""The lines of the table. Each function measures one piece of work and yields its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from surgery import activate, load_adapter, merge, remove, save_adapter, unmerge
from tests.benchmarks import models
from tests.benchmarks.models import disturb, ours, theirs, twin
from tests.benchmarks.timing import Setting, Times, Work, collected, interleaved, once, process_seconds


@dataclass(frozen=True)
class Row:
    """One figure: a ratio `to` the frozen base, PEFT or torch, or a plain number; and PEFT's figure."""

    work: str
    to: str
    aim: float
    figure: float
    peft: float | None = None
    seconds: float | None = None  # what the work took
    below_peft: bool = False

    @property
    def met(self) -> bool:
        beaten = not self.below_peft or self.peft is None or self.figure < self.peft
        return round(self.figure, 3 if self.aim < 0.1 else 2) <= self.aim and beaten


# Putting adapters in ------------------------------------------------------------------------------------------


def inject(setting: Setting) -> Iterator[Row]:
    for size, aim in ((16, 0.25), (1024, 0.5)):
        base = models.Stack(64, size).to(setting.device)
        injections = {"ours": ours, "peft": theirs}
        times = collected(injections, setting.rounds + 1, partial(_injection_seconds, injections, base))
        work = f"first adapter on 448 Linears, {size:,} wide"
        yield Row(work, "PEFT", aim, times.ratio("ours", "peft"), 1.0, times.seconds("ours"))


def _injection_seconds(injections: dict[str, Callable[[nn.Module], Any]], base: nn.Module, name: str) -> float:
    model = twin(base)
    return once(lambda: injections[name](model))


def stacked(setting: Setting) -> Iterator[Row]:
    """One more adapter beside many: added, loaded from PEFT's files, and removed."""
    layers, others = (8, 7) if setting.quick else (128, 31)
    base = models.Stack(layers, 16).to(setting.device)
    mine, their = twin(base), theirs(twin(base), "a0")
    for index in range(others):
        ours(mine, f"a{index}")
    activate(mine, "a0")  # as PEFT's are: one is live
    for index in range(1, others):
        their.add_adapter(f"a{index}", their.peft_config["a0"])
    beside = f"on {layers * 7} Linears"
    with TemporaryDirectory() as folder:
        their.save_pretrained(folder, selected_adapters=["a0"])
        spent = _cycles(mine, f"{folder}/a0", 3 if setting.quick else 5)
        added = once(lambda: their.add_adapter("last", their.peft_config["a0"]))
        activate(ours(mine, "last"), "a0")
        loaded = once(lambda: their.load_adapter(f"{folder}/a0", "loaded"))
        beyond = _cycles(mine, f"{folder}/a0", 3 if setting.quick else 5)
    gone = once(lambda: their.delete_adapter("loaded"))
    for label, seconds, peft, aim in (
        (f"adapter #{others + 1} beside {others} others", spent["add"], added, 0.03),
        (f"load adapter #{others + 2} from PEFT's files", beyond["load"], loaded, 0.03),
        (f"remove adapter #{others + 2}", beyond["remove"], gone, 0.03),
    ):
        yield Row(f"{label} {beside} (PEFT: {peft:.1f} s)", "PEFT", aim, seconds / peft, 1.0, seconds)


def flat(setting: Setting) -> Iterator[Row]:
    """The same with many adapters and with one; one is live."""
    layers, many = (8, 10) if setting.quick else (128, 100)
    base = models.Stack(layers, 16).to(setting.device)
    few, full = twin(base), twin(base)
    with TemporaryDirectory() as folder:
        for model, count in ((few, 1), (full, many)):
            for index in range(count):
                activate(ours(model, f"a{index}"), "a0")
        save_adapter(few, folder, "a0", format="peft")
        spent: dict[str, list[float]] = {}
        for _ in range(1 if setting.quick else setting.rounds):
            beside_one, other = (_cycles(model, folder, 1) for model in (few, full))
            for verb in beside_one:
                spent.setdefault(verb, []).append(other[verb] / beside_one[verb])
    for verb, label in (("add", "add an adapter"), ("load", "load one from PEFT's files"), ("remove", "remove one")):
        work = f"{label} beside {many} others on {layers * 7} Linears, to beside one"
        yield Row(work, "one", 1.1, median(spent[verb]))


def _cycles(model: nn.Module, folder: str, rounds: int) -> dict[str, float]:
    """Seconds to add one more adapter, to remove it, and to load it from a folder."""
    spent: dict[str, list[float]] = {"add": [], "load": [], "remove": []}
    for _ in range(rounds):
        spent["add"].append(once(lambda: ours(model, "one more")))
        spent["remove"].append(once(lambda: remove(model, "one more")))
        spent["load"].append(once(lambda: load_adapter(model, folder, "one more")))
        remove(model, "one more")
    return {verb: median(times) for verb, times in spent.items()}


# Running ------------------------------------------------------------------------------------------------------


def forward(setting: Setting) -> Iterator[Row]:
    for name, base in bases(setting, models.llama, models.minilm):
        works = _forwards(_three(base), _ids(setting, 1, 128))
        with torch.no_grad():
            yield _beside_base(f"forward, rank 8, 128 tokens: {name}", 1.07, interleaved(setting, works))


def decode(setting: Setting) -> Iterator[Row]:
    for name, base in bases(setting, models.llama, models.small_llama):
        token = _ids(setting, 1, 1)
        with torch.no_grad():
            works = {key: _decoder(model, token) for key, model in _three(base).items()}
            yield _beside_base(f"decode one token after 128, rank 8: {name}", 1.12, interleaved(setting, works))


def train(setting: Setting) -> Iterator[Row]:
    for dropout, aim in ((0.0, 1.13), (0.1, 1.3)):
        for name, base in bases(setting, models.llama, models.minilm):
            embeddings = _embedded(setting, base)
            works = {k: partial(_step, m, embeddings) for k, m in _three(base, True, dropout).items()}
            times = interleaved(setting, works)
            yield replace(_beside_base(f"training step, dropout {dropout:g}: {name}", aim, times), below_peft=True)


def saved(setting: Setting) -> Iterator[Row]:
    for name, base in bases(setting, models.llama, models.minilm):
        embeddings = _embedded(setting, base)
        sizes = {key: _saved_bytes(model, embeddings) for key, model in _three(base, True, 0.1).items()}
        work = f"saved for backward, dropout 0.1: {name} (base {sizes['base'] / sizes['peft']:.2f})"
        yield Row(work, "PEFT", 0.7, sizes["ours"] / sizes["peft"], 1.0)


Make = Callable[[str, torch.dtype], nn.Module]


def bases(setting: Setting, *makes: Make) -> Iterator[tuple[str, nn.Module]]:
    """The frozen models with their names; on a GPU in bfloat16, too."""
    for make in makes:
        for dtype in (torch.float32, torch.bfloat16) if setting.cuda else (torch.float32,):
            yield models.named(make, dtype), make(setting.device, dtype)


def _three(base: nn.Module, train: bool = False, dropout: float = 0.0) -> dict[str, Any]:
    """The frozen base, ours and PEFT's on the same weights, all adapters moved from zero."""
    candidates = {
        "base": twin(base),
        "ours": ours(twin(base), dropout=dropout),
        "peft": theirs(twin(base), lora_dropout=dropout),
    }
    for model in candidates.values():
        disturb(model.train(train))
    return candidates


def _beside_base(work: str, aim: float, times: Times) -> Row:
    return Row(work, "base", aim, times.ratio("ours", "base"), times.ratio("peft", "base"), times.seconds("ours"))


def _ids(setting: Setting, batch: int, length: int) -> Tensor:
    return torch.randint(0, 1000, (batch, length), device=setting.device)


def _forwards(candidates: dict[str, Any], ids: Tensor) -> dict[str, Work]:
    return {key: partial(model, input_ids=ids) for key, model in candidates.items()}


def _decoder(model: Any, token: Tensor, length: int = 128) -> Work:
    from transformers import DynamicCache

    past: Any = DynamicCache()
    model(input_ids=token.expand(1, length), past_key_values=past)

    def step() -> None:
        model(input_ids=token, past_key_values=past)
        past.crop(-1)

    return step


def _embedded(setting: Setting, base: Any) -> Tensor:
    return base.get_input_embeddings()(_ids(setting, 4, 128)).detach().requires_grad_(True)


def _step(model: nn.Module, embeddings: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    embeddings.grad = None
    model(inputs_embeds=embeddings).last_hidden_state.square().mean().backward()


def _saved_bytes(model: nn.Module, embeddings: Tensor) -> int:
    """Bytes that autograd keeps for the backward, each memory block once, without the model's tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # as long as it lives, its address is its own

    def pack(tensor: Tensor) -> Tensor:
        block = tensor.untyped_storage()
        if block.data_ptr() not in own:
            sizes[block.data_ptr()] = block.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embeddings).last_hidden_state.square().mean()
    return sum(sizes.values())


# Prefixes -----------------------------------------------------------------------------------------------------


def prefix(setting: Setting) -> Iterator[Row]:
    for name, base in bases(setting, models.decoder):
        candidates = {"ours": models.our_prefix(twin(base), 20), "peft": models.their_prefix(twin(base), 20)}
        with torch.no_grad():
            times = interleaved(setting, _forwards(candidates, _ids(setting, 1, 128)))
        work = f"prefix of 20, forward, 128 tokens: {name}"
        yield Row(work, "PEFT", 1.0, times.ratio("ours", "peft"), 1.0, times.seconds("ours"))
        ids = _ids(setting, 4, 128)
        times = interleaved(
            setting, {key: partial(_prefix_step, model.train(), ids) for key, model in candidates.items()}
        )
        work = f"prefix of 20, training step: {name}"
        yield Row(work, "PEFT", 1.0, times.ratio("ours", "peft"), 1.0, times.seconds("ours"))
        candidates["ours"].eval()
        for length in (128,) if setting.quick else (128, 1024):
            with torch.no_grad():
                token = _ids(setting, 1, 1)
                works = {
                    "base": _decoder(base, token, length + 20),
                    "ours": _decoder(candidates["ours"], token, length),
                }
                times = interleaved(setting, works)
            work = f"prefix of 20, decode one token after {length:,} (base: after {length + 20:,}): {name}"
            yield Row(work, "base", 1.1, times.ratio("ours", "base"), None, times.seconds("ours"))
    deep = models.decoder(setting.device, torch.float32, layers=32)
    times = collected(["ours"], 3, lambda _: once(partial(models.our_prefix, twin(deep), 20)))
    yield Row("prefix of 20, seconds to put it on 32 layers, 512 wide", "", 1.0, times.seconds("ours"))


def _prefix_step(model: nn.Module, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids).logits.square().mean().backward()


# Merging ------------------------------------------------------------------------------------------------------


def merging(setting: Setting) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        yield from _merging(setting, dtype)


def _merging(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    base, name = models.llama(setting.device, dtype), models.named(models.llama, dtype)
    mine, their = ours(deepcopy(base)), theirs(deepcopy(base))
    disturb(mine)
    disturb(their)
    sizes: dict[str, float] = {}

    def cycle(keep: Any) -> None:
        report = merge(mine, keep=keep)
        sizes[keep] = report.nbytes / report.entries
        unmerge(mine)

    def inexact() -> None:
        their.merge_adapter()
        their.unmerge_adapter()

    times = interleaved(
        setting, {"copy": partial(cycle, "copy"), "record": partial(cycle, "record"), "peft": inexact}, 1
    )
    assert _share_of_changes(mine, base) == 0.0, "unmerging lost bits"
    lost = f"(PEFT: {100 * _share_of_changes(their, base):.0f} % of the entries changed)"
    for keep, aim in (("copy", 0.3), ("record", 4.0)):
        work = f"merge + unmerge to the bit, keep={keep!r}: {name} {lost}"
        yield Row(work, "PEFT", aim, times.ratio(keep, "peft"), 1.0, times.seconds(keep))
    yield Row(f"bytes an entry of the record, ‖ΔW‖/‖W‖ 3 %: {name}", "", 0.15, sizes["record"])


def _share_of_changes(model: nn.Module, base: nn.Module) -> float:
    """The share of the entries of adapted weights that are not the base's."""
    before = dict(base.named_parameters())
    differing = total = 0
    for name, p in model.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if own in before and own.endswith("_proj.weight"):
            differing += int((before[own] != p).sum())
            total += p.numel()
    return differing / total


def merged(setting: Setting) -> Iterator[Row]:
    for name, base in bases(setting, models.llama, models.minilm):
        candidates = {"base": base, "ours": ours(deepcopy(base)), "peft": theirs(deepcopy(base))}
        merge(candidates["ours"])
        candidates["peft"].merge_adapter()
        works = _forwards(candidates, _ids(setting, 1, 128))
        with torch.no_grad():
            yield _beside_base(f"merged forward, 128 tokens: {name}", 1.0, interleaved(setting, works))


# Starting -----------------------------------------------------------------------------------------------------


def importing(setting: Setting) -> Iterator[Row]:
    codes = {name: f"import {name}" for name in ("torch", "surgery", "peft")}
    with TemporaryDirectory() as cache:
        for code in codes.values():  # an installed package has its bytecode beside it
            process_seconds(code, cache)
        times = collected(codes, setting.rounds, lambda name: process_seconds(codes[name], cache))
    ratios = times.ratio("surgery", "torch"), times.ratio("peft", "torch")
    yield Row("import, in a fresh process", "torch", 1.05, *ratios)


LINES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "inject": inject,
    "stacked": stacked,
    "flat": flat,
    "forward": forward,
    "decode": decode,
    "train": train,
    "saved": saved,
    "prefix": prefix,
    "merge": merging,
    "merged": merged,
    "import": importing,
}
