"""A Trainer's run with three adapters that is interrupted: by an error at some step, or by SIGKILL at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from surgery import activate, apply_rules
from surgery.rules import IA3Rule, LoraRule, TrainRule
from tests.support import ROOT, tiny

transformers: Any = pytest.importorskip("transformers")
AdapterCheckpoints: Any = pytest.importorskip("surgery.trainer").AdapterCheckpoints
last_checkpoint: Any = pytest.importorskip("surgery.trainer").last_checkpoint

STEPS, ACCUMULATED = 8, 2


class Sentences(Dataset):
    def __init__(self, seed: int) -> None:
        self.ids = torch.randint(3, 99, (24, 7), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 2}


class Crash(transformers.TrainerCallback):
    """Raises an error after this number of micro-batches of this process."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    on_step_end = on_substep_end


def model(seed: int, fresh: bool) -> nn.Module:
    """BERT with one adapter that trains, one that is idle, and one that is live and frozen.

    A resumed run starts from other values, so that the test shows values that were not loaded.
    """
    torch.manual_seed(seed)
    adapted = tiny.bert()[0]
    apply_rules(adapted, [LoraRule(["query", "value"], rank=4, dropout=0.1), TrainRule("classifier")], adapter="live")
    apply_rules(adapted, LoraRule("key", rank=2, init="random"), adapter="frozen")
    apply_rules(adapted, [LoraRule("query", rank=2, init="random"), IA3Rule("key")], adapter="idle")
    activate(adapted, ["live", "frozen"], weights={"frozen": 0.5})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".adapters.frozen." in name:
                parameter.requires_grad_(False)
            if ".adapters." in name and not fresh:
                parameter.fill_(0.123)
    return adapted


def trainer(seed: int, folder: Path, fresh: bool, *callbacks: Any) -> Any:
    settings = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=2, logging_steps=1, learning_rate=1e-2, seed=seed, warmup_steps=2,
        lr_scheduler_type="cosine", gradient_accumulation_steps=ACCUMULATED, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, save_total_limit=2,
    )  # fmt: skip
    return transformers.Trainer(
        model=model(seed, fresh),
        args=settings,
        train_dataset=Sentences(seed),
        callbacks=[AdapterCheckpoints(), *callbacks],
    )


def run(seed: int, folder: Path, *callbacks: Any) -> dict[str, Any]:
    """Start, or resume from the last complete checkpoint; return all tensors and the losses of every step."""
    checkpoint = last_checkpoint(folder)
    training = trainer(seed, folder, checkpoint is None, *callbacks)
    training.train(resume_from_checkpoint=checkpoint)
    losses = {line["step"]: line["loss"] for line in training.state.log_history if "loss" in line}
    return {"tensors": {name: tensor.clone() for name, tensor in training.model.state_dict().items()}, "losses": losses}


# Killed -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """For each line (a seed and a folder), fork a child that runs to the end; print its process id."""
    transformers.logging.set_verbosity_error()
    print("ready", flush=True)
    for line in sys.stdin:
        seed, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if not child:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            result = run(int(seed), Path(folder))
            torch.save(result, Path(folder) / "result.tmp")
            os.replace(Path(folder) / "result.tmp", Path(folder) / "result.pt")
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else f"ended {os.WEXITSTATUS(status)}", flush=True)


class Server:
    """The process that forks these children, started once."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.support.crashes import serve; serve()"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, env=environment
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, seed: int, folder: Path, wait: Callable[[], Any] | None = None) -> str:
        """Start or resume, kill after the wait, and return how the run ended."""
        assert self.process.stdin is not None
        print(f"{seed} {folder}", file=self.process.stdin, flush=True)
        child = int(self._line())
        if wait is not None:
            wait()
            with contextlib.suppress(ProcessLookupError):  # it had already ended
                os.kill(child, signal.SIGKILL)
        return self._line()

    def close(self) -> None:
        self.process.communicate()


def killed_run(
    server: Server, seed: int, folder: Path, whole: float, kills: int, chance: random.Random
) -> dict[str, int]:
    """Kill a run repeatedly; an uninterrupted run takes `whole` seconds. Return how often it was killed half-way."""
    counts = {"killed": 0, "half": 0}

    def while_it_saves() -> None:
        """Wait until a new checkpoint appears; writing it takes some milliseconds."""
        before, deadline = set(folder.glob("checkpoint-*")), time.monotonic() + whole
        while set(folder.glob("checkpoint-*")) <= before and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.03)

    def at_any_moment() -> None:
        time.sleep(chance.random() * whole)

    waits = [while_it_saves, at_any_moment]
    while counts["killed"] < kills and server.run(seed, folder, waits[counts["killed"] % 2]) == "killed":
        counts["killed"] += 1
        last = last_checkpoint(folder)
        steps = [int(place.name.rpartition("-")[2]) for place in folder.glob("checkpoint-*")]
        counts["half"] += bool(steps) and (last is None or max(steps) > int(last.rpartition("-")[2]))
    if not (folder / "result.pt").exists():
        assert server.run(seed, folder) == "ended 0"
    return counts
