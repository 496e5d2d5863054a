"""Pushing adapters and loading them by a repository's name, from a small hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.hub_server import hub

pytest.importorskip("huggingface_hub")

SETUP = """
import sys
import torch
from torch import nn
from surgery import rules
from surgery.rules import LoraRule, ReftRule
from surgery import LoadError, SurgeryError, apply_rules, load_adapter, push_adapter, remove
from surgery.testing import Snapshot

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

x = torch.ones(1, 4)
"""

PUSH = """
model = apply_rules(base(), [LoraRule("0", rank=2, init="random")])
told = {"accuracy": 0.97}
print(push_adapter(model, "me/topics", metadata=told, licence="apache-2.0", token="hf_x"))
expected = model(x)
report = load_adapter(remove(model), "me/topics")
assert torch.equal(model(x), expected) and report.metadata == told and report.licence == "apache-2.0"
remove(model)
apply_rules(model, [ReftRule("0", rank=2)])
push_adapter(model, "me/edits", token="hf_x")
expected = model(x)
load_adapter(remove(model), "me/edits")
assert torch.equal(model(x), expected)
"""

MISSING = """
model = base()
before = Snapshot(model)
for name in ("me/nothing", "no such name!", "a/b/c"):
    try:
        load_adapter(model, name)
    except LoadError as error:
        print(name, "|", error)
    else:
        raise AssertionError
assert not before.differences(model)
"""


def run(code: str, endpoint: str, home: Path) -> str:
    """Runs in a separate process: huggingface_hub reads HF_ENDPOINT when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
                "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], env={**os.environ, **settings}, cwd=ROOT, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pushed_and_loaded_by_name(tmp_path: Path) -> None:
    with hub() as (endpoint, repositories):
        printed = run(PUSH, endpoint, tmp_path)
        assert printed.startswith(f"{endpoint}/me/topics/commit/")
        assert set(repositories["me/topics"]) - {".gitattributes"} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        assert {"rules.json", "adapter.safetensors"} < set(repositories["me/edits"])
        card = repositories["me/topics"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\nlicense: apache-2.0\ntags:\n- model-surgery\n---\n")
    for part in ("16 numbers on 1 modules", 'load_adapter(model, "me/topics")', "LoraRule(", "| accuracy | 0.97 |"):
        assert part in card
    assert "library_name: model-surgery" in repositories["me/edits"]["README.md"].decode()


def test_what_the_hub_does_not_have(tmp_path: Path) -> None:
    with hub() as (endpoint, _):
        printed = run(MISSING, endpoint, tmp_path)
    assert (
        "RepositoryNotFoundError" in printed
        and "'no such name!' is not a folder" in printed
        and "'a/b/c' is not a folder" in printed
    )
    refused = run(MISSING, "http://127.0.0.1:9", tmp_path)  # nothing listens there
    assert "the hub has not answered" in refused
