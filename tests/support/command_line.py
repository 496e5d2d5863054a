"""The command `surgery` in this process, and in processes of its own; and files for it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from surgery import apply_rules, remove, save_adapter
from surgery.rules import LoraRule
from tests.support import ROOT
from tests.support.forking import Forks

__all__ = ["Files", "Result", "make_files", "run", "run_apart", "run_forked"]

RULES = "- rule: lora\n  targets: [query, value]\n  rank: 4\n"


@dataclass(frozen=True)
class Files:
    """A model of transformers, two adapters on it (PEFT's format and ours), and a file of rules."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "bert"

    @property
    def peft(self) -> Path:
        return self.folder / "adapters" / "news"

    @property
    def ours(self) -> Path:
        return self.folder / "adapters" / "mail"

    @property
    def rules(self) -> Path:
        return self.folder / "lora.yaml"

    def load(self, folder: Path | None = None) -> Any:
        from transformers import BertForSequenceClassification

        return BertForSequenceClassification.from_pretrained(folder or self.model).eval()


def make_files(folder: Path) -> Files:
    from transformers import BertConfig, BertForSequenceClassification

    files = Files(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(files.model)
    formats: list[tuple[Path, int, Literal["peft", "surgery"]]] = [(files.peft, 4, "peft"), (files.ours, 2, "surgery")]
    for path, rank, format in formats:
        apply_rules(model, LoraRule(["query", "value"], rank=rank, init="random"), adapter=path.name)
        save_adapter(model, path, path.name, format=format, licence="apache-2.0", metadata={"accuracy": 0.9})
        remove(model)
    files.rules.write_text(RULES)
    return files


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


def run(*words: object) -> Result:
    """The command in this process."""
    from typer.testing import CliRunner

    from surgery.commands.app import app

    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="surgery")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


@cache
def _forks() -> Forks:
    modules = [
        "surgery.commands.app",
        "surgery.rules",
        "surgery.onnx.export",
        "yaml",
        "rich.progress",
        "typer.rich_utils",
    ]
    modules += ["transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"]
    return Forks([*modules, "onnxscript", "torch.onnx._internal.exporter._core"])


def run_forked(*words: object, folder: Path, before: str = "") -> Result:
    """The command in a process of its own, forked from one that has imported torch and transformers.

    `before`: code that runs first in that process.
    """
    argv = ["surgery", *map(str, words)]
    code = f"import sys\n{before}\nsys.argv = {argv!r}\nfrom surgery.commands.main import main\nmain()"
    done = _forks().run(code, folder)
    return Result(done.returncode, done.stdout, done.stderr)


def run_apart(*words: object, folder: Path, code: str = "") -> Result:
    """`python -m surgery` in a new process; with `code`, a program instead, which gets the words as arguments."""
    program = ["-c", code] if code else ["-m", "surgery"]
    command = [sys.executable, "-W", "ignore", *program, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=_environment())
    return Result(done.returncode, done.stdout, done.stderr)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
