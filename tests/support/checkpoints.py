"""Checkpoints of tiny models in several files, and merges of them that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery import merge_files, unmerge_files
from tests.support import ROOT


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def contents(folder: Path, without: Iterable[str] = ()) -> dict[str, bytes]:
    """All files of a folder by their names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {str(file.relative_to(folder)): file for file in files}
    return {name: file.read_bytes() for name, file in names.items() if not name.startswith(tuple(without) or "//")}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Two sets of tensors are the same: names, dtypes, bits."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    wrong = [name for name, t in theirs.items() if ours[name].dtype != t.dtype or not torch.equal(ours[name], t)]
    assert not wrong, wrong


def stack(layers: int = 6, width: int = 16) -> nn.Module:
    """A model that is not of transformers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def write_sharded(model: nn.Module, folder: Path, per_file: int = 2) -> None:
    """Writes a state dict as several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    names = list(state)
    parts = [names[i : i + per_file] for i in range(0, len(names), per_file)]
    mapping: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: state[name].clone() for name in part}, folder / file, {"format": "pt"})
        mapping |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def meta(make: Callable[[], nn.Module] = stack) -> nn.Module:
    with torch.device("meta"):
        return make()


# Merges that are killed -----------------------------------------------------------------------------------------------


def merges(base: str, adapter: str, out: str, back: str) -> None:
    """A process that forks, for each line, a child that merges into a folder, and then restores the base from it.

    Its first line of output is the seconds of one such run.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder)
        merge_files(base, adapter, place / "first", keep_record=True, model=meta())  # imports what it needs
        start = time.monotonic()
        merge_files(base, adapter, place / "out", keep_record=True, model=meta())
        unmerge_files(place / "out", place / "back", model=meta())
        print(time.monotonic() - start, flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            if not Path(out).exists():
                merge_files(base, adapter, out, keep_record=True, model=meta())
            if not Path(back).exists():
                unmerge_files(out, back, model=meta())
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else status, flush=True)


def kill_merges(
    base: Path, adapter: Path, out: Path, back: Path, times: int, seen: Callable[[], None], chance: random.Random
) -> int:
    """Kills merges and restorations at random moments, and checks the folders after each. Returns the kills."""
    words = ", ".join(repr(str(path)) for path in (base, adapter, out, back))
    command = [sys.executable, "-c", f"from tests.support.checkpoints import merges; merges({words})"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed = runs = 0
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        seconds = float(process.stdout.readline())
        while killed < times and runs < 20 * times:
            runs += 1
            print("next", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            time.sleep(chance.random() * 2 * seconds)
            with contextlib.suppress(ProcessLookupError):  # it is done
                os.kill(child, signal.SIGKILL)
            end = process.stdout.readline().strip()
            assert end in ("killed", "0"), end
            killed += end == "killed"
            seen()
        process.stdin.close()
    return killed
