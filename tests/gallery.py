"""`make gallery`: a picture of every rule at work, drawn from a small model it is applied to, into docs/pictures/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rules
from surgery import Rule, apply_rules, draw

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


class Experts(nn.Module):
    """Two matrices to a token's expert, held as stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.up[expert])


def linear() -> nn.Module:
    return nn.Linear(8, 8)


# Each rule at a module it is made for, in its plain form.
SHOWN: dict[str, tuple[Rule, Callable[[], nn.Module]]] = {
    "LoraRule": (rules.LoraRule("m", rank=2), linear),
    "ExpertLoraRule": (rules.ExpertLoraRule("m", rank=2), Experts),
    "TrainRule": (rules.TrainRule("m"), linear),
    "BiasRule": (rules.BiasRule("m"), linear),
    "NormRule": (rules.NormRule("m"), lambda: nn.LayerNorm(8)),
    "TokensRule": (rules.TokensRule("m", tokens=[2, 7]), lambda: nn.Embedding(10, 8)),
    "IA3Rule": (rules.IA3Rule("m"), linear),
    "VeraRule": (rules.VeraRule("m", rank=2), linear),
    "LohaRule": (rules.LohaRule("m", rank=2), linear),
    "LokrRule": (rules.LokrRule("m", rank=1), linear),
    "OftRule": (rules.OftRule("m", block_size=4), linear),
    "BoftRule": (rules.BoftRule("m", block_size=4), linear),
    "HraRule": (rules.HraRule("m", rank=2), linear),
    "RoadRule": (rules.RoadRule("m", group_size=4), linear),
    "MissRule": (rules.MissRule("m", rank=2), linear),
    "BottleneckRule": (rules.BottleneckRule("m", size=2), linear),
    "ReftRule": (rules.ReftRule("m", rank=2), linear),
    "SteerRule": (rules.SteerRule("m", direction=[0.0] * 8), linear),
    "CaptureRule": (rules.CaptureRule("m"), linear),
    "ReplaceRule": (rules.ReplaceRule("m", by=nn.SiLU), nn.ReLU),
    "AdaLoraRule": (rules.AdaLoraRule("m", rank=2), linear),
    "FourierRule": (rules.FourierRule("m", n_frequency=4), linear),
    "ShiraRule": (rules.ShiraRule("m", rank=1), linear),
    "C3aRule": (rules.C3aRule("m", block_size=4), linear),
    "RandLoraRule": (rules.RandLoraRule("m", rank=4), linear),
}


def pictures() -> dict[str, str]:
    """A rule's name → its picture, SVG."""
    found = {}
    for name, (rule, make) in SHOWN.items():
        model = nn.ModuleDict({"m": make().eval()}).eval()
        found[name] = draw(apply_rules(model, [rule]), "m", before=False)
    return found


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    made = pictures()
    for old in PICTURES.glob("*.svg"):
        if old.stem not in made:
            old.unlink()
    for name, text in made.items():
        (PICTURES / f"{name}.svg").write_text(text + "\n", encoding="utf-8")
    print(f"{len(made)} pictures in {PICTURES}")


if __name__ == "__main__":
    main()
