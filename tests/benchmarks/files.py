"""The line “files”: an adapter merged into a checkpoint of several files, beside a short loop and beside PEFT.

Each way runs in a process of its own, which reports the CPU time and the peak of its private memory without imports.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from surgery import apply_rules, save_adapter
from surgery.rules import LoraRule
from tests.benchmarks.lines import Row
from tests.benchmarks.timing import Setting

MEGABYTES, SHARDS = 512, 8  # of the checkpoint, in bfloat16
LAYERS = 32  # of seven Linears each, at any size
WAYS = ("loop", "files", "peft")


def files(setting: Setting, megabytes: int | None = None) -> Iterator[Row]:
    """`megabytes`: the size of the checkpoint. Default None: `MEGABYTES`."""
    megabytes = 16 if setting.quick else megabytes or MEGABYTES
    with TemporaryDirectory() as folder:
        write(Path(folder), megabytes)
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(1 if setting.quick else 3):
            for way in WAYS:
                spent[way].append(_measured(way, Path(folder)))
        seconds = {way: min(second for second, _ in runs) for way, runs in spent.items()}
        memory = {way: min(peak for _, peak in runs) for way, runs in spent.items()}
    work = f"merge into {SHARDS} files of {megabytes / SHARDS:.0f} MB, rank 16 on all Linears"
    ratio, peft = seconds["files"] / seconds["loop"], seconds["peft"] / seconds["loop"]
    yield Row(f"{work}: CPU time", "loop", 1.3, ratio, peft, seconds["files"])
    ratio, peft = memory["files"] / memory["loop"], memory["peft"] / memory["loop"]
    yield Row(f"{work}: private memory ({memory['files'] / 1e6:,.0f} MB)", "loop", 1.0, ratio, peft)


def write(folder: Path, megabytes: int) -> None:
    """Writes a base of about this size, and an adapter in PEFT's format."""
    import transformers

    width = max(64, 64 * round((megabytes * 1e6 / 2 / (LAYERS * 12.1)) ** 0.5 / 64))
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=int(2.7 * width), num_hidden_layers=LAYERS,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=f"{max(1, int(megabytes * 1.05 / SHARDS))}MB")
    apply_rules(model, LoraRule("all-linear", rank=16, init="random"))
    save_adapter(model, folder / "adapter", format="peft")


def _measured(way: str, folder: Path) -> tuple[float, float]:
    """The CPU seconds and the peak of private bytes of one way."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.files", way, str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    data = json.loads(result.stdout.splitlines()[-1])
    return data["seconds"], data["bytes"]


# What runs in the process ---------------------------------------------------------------------------------------------


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


def _warm_up(way: str) -> None:
    """Imports what the way needs: a tiny merge."""
    with TemporaryDirectory() as folder:
        write(Path(folder), 1)
        RUN[way](Path(folder) / "base", Path(folder) / "adapter", Path(folder) / "out")


def private_bytes() -> int:
    """The private memory of this process that is in use now; Linux alone."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", text)[0])


def main() -> None:
    import threading

    torch.set_num_threads(1)
    way, folder = sys.argv[1], Path(sys.argv[2])
    _warm_up(way)
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    RUN[way](folder / "base", folder / "adapter", folder / "out")
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "bytes": max(peak - before, 0)}))


if __name__ == "__main__":
    main()
