"""The line “files”: an adapter merged into a checkpoint of several files, beside a short loop and beside PEFT.

CPU time is measured in this process, the ways in turn. Memory is measured in a process for each way, which reports the
peak of its private memory above that before the merge; Linux alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from surgery import apply_rules, save_adapter
from surgery.rules import LoraRule
from tests.benchmarks.growth import growth_exponent
from tests.benchmarks.lines import Row
from tests.benchmarks.timing import Setting, collected, once

MEGABYTES, SHARDS = 512, 8  # of the checkpoint, in bfloat16
LAYERS = 32  # of seven Linears each
WAYS = ("loop", "files", "peft")


def files(setting: Setting, megabytes: int | None = None) -> Iterator[Row]:
    """`megabytes`: the size of the checkpoint. Default None: `MEGABYTES`."""
    megabytes, layers = (64, 2) if setting.quick else (megabytes or MEGABYTES, LAYERS)
    with TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, megabytes, layers)
        for way in WAYS:
            _warm_up(way)
        seconds = collected(WAYS, 1 if setting.quick else min(5, setting.rounds), partial(_seconds, folder))
        peaks = {way: _peak(way, folder) for way in WAYS}
    work = f"merge into {SHARDS} files of {megabytes / SHARDS:.0f} MB, rank 16 on {7 * layers} Linears"
    ratio, peft = (seconds.ratio(way, "loop") for way in ("files", "peft"))
    yield Row(f"{work}: CPU time", "loop", 1.3, ratio, peft, seconds.seconds("files"))
    ratio, peft = (peaks[way] / peaks["loop"] for way in ("files", "peft"))
    yield Row(f"{work}: private memory ({peaks['files'] / 1e6:,.0f} MB)", "loop", 1.0, ratio, peft)
    yield from _growth(setting)


def _growth(setting: Setting) -> Iterator[Row]:
    """How the CPU time grows with the sites of small tensors, and with the bytes of the same number of tensors."""
    counts, sizes = ((2, 4), (16, 32)) if setting.quick else ((8, 32, 128), (64, 256, 1024))
    small = {7 * layers: partial(write, layers=layers, width=64) for layers in counts}
    wide = {
        megabytes: partial(write, megabytes=megabytes, layers=4 if setting.quick else LAYERS) for megabytes in sizes
    }
    for of, bases in (("sites", small), ("megabytes", wide)):
        with TemporaryDirectory() as place:
            for size, make in bases.items():
                make(Path(place) / str(size))
            seconds = {size: _growing(Path(place) / str(size), setting) for size in bases}
        yield Row(
            f"merge into files: growth with {' / '.join(map(str, seconds))} {of}", "", 1.05, growth_exponent(seconds)
        )


def _growing(folder: Path, setting: Setting) -> float:
    return min(_seconds(folder, "files") for _ in range(2 if setting.quick else 3))


def write(folder: Path, megabytes: float = 0, layers: int = LAYERS, width: int | None = None) -> None:
    """Writes a base of about this size, and an adapter in PEFT's format. `width`: instead of the size."""
    import transformers

    per_layer = 4 + 3 * 2.7  # times width²
    width = width or max(64, 64 * round((megabytes * 1e6 / 2 / layers / per_layer) ** 0.5 / 64))
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=int(2.7 * width), num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder / "base", max_shard_size=int(total * 1.05 / SHARDS))
    apply_rules(model, LoraRule("all-linear", rank=16, init="random"))
    save_adapter(model, folder / "adapter", format="peft")


def _warm_up(way: str) -> None:
    """A tiny merge, which imports what the way needs."""
    with TemporaryDirectory() as place:
        write(Path(place), width=64, layers=1)
        _seconds(Path(place), way)


def _seconds(folder: Path, way: str) -> float:
    """The CPU seconds of one way."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    return once(partial(RUN[way], folder / "base", folder / "adapter", folder / "out"))


def _peak(way: str, folder: Path) -> float:
    """The peak of the private bytes of one way, in a process of its own."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.files", way, str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.splitlines()[-1])


# The ways -------------------------------------------------------------------------------------------------------------


def by_loop(base: Path, adapter: Path, out: Path) -> None:
    """The short loop that most people write: each file is read, changed and written whole."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    factors = load_file(adapter / "adapter_model.safetensors")
    out.mkdir()
    for file in sorted(base.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                weight = stored.get_tensor(key)
                A = factors.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
                if A is not None:
                    B = factors[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"]
                    weight = (weight.float() + scale * (B.float() @ A.float())).to(weight.dtype)
                tensors[key] = weight
            save_file(tensors, out / file.name, stored.metadata())
    for file in base.glob("*.json"):
        shutil.copyfile(file, out / file.name)


def by_files(base: Path, adapter: Path, out: Path) -> None:
    from surgery import merge_files

    merge_files(base, adapter, out)


def by_peft(base: Path, adapter: Path, out: Path) -> None:
    import peft
    import transformers

    model: Any = transformers.LlamaForCausalLM.from_pretrained(base)
    merged: Any = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)


RUN: dict[str, Callable[[Path, Path, Path], None]] = {"loop": by_loop, "files": by_files, "peft": by_peft}


# What runs in the process that measures memory ------------------------------------------------------------------------


def _private_bytes() -> int:
    """The private memory of this process that is in use now; Linux alone."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", text)[0])


def main() -> None:
    import threading

    torch.set_num_threads(1)
    way, folder = sys.argv[1], Path(sys.argv[2])
    _warm_up(way)
    before, peak, done = _private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    RUN[way](folder / "base", folder / "adapter", folder / "out")
    done.set()
    watcher.join()
    print(max(peak - before, 0))


if __name__ == "__main__":
    main()
