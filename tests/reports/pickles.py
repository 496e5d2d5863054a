"""A pickled model of this version, for later releases to open: `python -m tests.reports.pickles` writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import surgery
from surgery import apply_rules, base_state_dict, deactivate, merge, unmerge
from surgery.rules import IA3Rule, LoraRule, TrainRule
from tests.support import ROOT

FOLDER = ROOT / "tests" / "storage" / "pickles"


def live_model() -> nn.Module:
    """A model with a live adapter of three rules and an idle adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4)).eval()
    apply_rules(model, LoraRule("3", rank=2), adapter="idle")
    deactivate(model)
    apply_rules(model, [LoraRule("0", rank=2, dora=True), IA3Rule("3"), TrainRule("2")], adapter="live")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".adapters." in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def merged_model() -> nn.Module:
    """A model with a merged adapter, whose record restores the bits of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).eval()
    apply_rules(model, LoraRule(["0", "2"], rank=2))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(".B"):
                tensor.add_(torch.randn_like(tensor))
    merge(model)
    return model


def write(file: Path) -> None:
    """Write both models with an input, their outputs, and the weights of their bases."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    cases = {}
    for name, make in (("live", live_model), ("merged", merged_model)):
        model, twin = make(), make()
        if name == "merged":
            unmerge(twin)
        cases[name] = {"model": model, "output": model(x).detach(), "base": dict(base_state_dict(twin))}
    file.parent.mkdir(exist_ok=True)
    torch.save({"input": x, "cases": cases}, file)


if __name__ == "__main__":
    write(FOLDER / f"{surgery.__version__}.pt")
