"""`make gallery` draws docs/pictures/: each rule at work on a small model, and the pictures of the how-to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Drawing, Rule, activate, apply_rules, draw, rules
from tests.support import ROOT

PICTURES = ROOT / "docs" / "pictures"


class Experts(nn.Module):
    """Experts with two matrices each, stored as stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.up[expert])


class Swish(nn.Module):
    """A SiLU written out, between two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(hidden * torch.sigmoid(hidden))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


class Registry(dict):
    """Functions by name, as transformers keeps its attentions."""


def eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2), None


ATTENTIONS = Registry(eager=eager)


class Attention(nn.Module):
    """Two heads; the attention function is looked up by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return ATTENTIONS["eager"](self, q, k, v, mask)[0].flatten(2)


class Mapped(Attention):
    """… with maps of its own for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in maps)
        return ATTENTIONS["eager"](self, q, k, v, mask)[0].flatten(2)


class Text(nn.Module):
    """Takes a text as ids or embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        return (self.words(input_ids) if inputs_embeds is None else inputs_embeds).cumsum(1)


def linear() -> nn.Module:
    return nn.Linear(8, 8)


# Each rule at a module it is made for, in its plain form.
SHOWN: dict[str, tuple[Rule, Callable[[], nn.Module]]] = {
    "LoraRule": (rules.LoraRule("m", rank=2), linear),
    "ExpertLoraRule": (rules.ExpertLoraRule("m", rank=2), Experts),
    "TrainRule": (rules.TrainRule("m"), linear),
    "BiasRule": (rules.BiasRule("m"), linear),
    "NormRule": (rules.NormRule("m"), lambda: nn.LayerNorm(8)),
    "StatisticsRule": (rules.StatisticsRule("m"), lambda: nn.BatchNorm1d(8)),
    "TokensRule": (rules.TokensRule("m", tokens=[2, 7]), lambda: nn.Embedding(10, 8)),
    "BaseRowsRule": (rules.BaseRowsRule("m", tokens=[2, 7]), lambda: nn.Embedding(10, 8)),
    "PrefixRule": (rules.PrefixRule("m", length=2), Attention),
    "AdaptionRule": (rules.AdaptionRule("m", length=2), Mapped),
    "PromptRule": (rules.PromptRule("m", length=2), Text),
    "MultitaskPromptRule": (rules.MultitaskPromptRule("m", length=2, tasks=3), Text),
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
    "RewriteRule": (rules.RewriteRule("m", pattern=swish, replacement=silu), Swish),
    "InsertRule": (rules.InsertRule("m", by="torch.nn.Tanh"), linear),
    "AdaLoraRule": (rules.AdaLoraRule("m", rank=2), linear),
    "FourierRule": (rules.FourierRule("m", n_frequency=4), linear),
    "ShiraRule": (rules.ShiraRule("m", rank=1), linear),
    "C3aRule": (rules.C3aRule("m", block_size=4), linear),
    "RandLoraRule": (rules.RandLoraRule("m", rank=4), linear),
}


EXAMPLES = {"PrefixRule": torch.zeros(1, 3, 8), "RewriteRule": torch.zeros(2, 8)}  # for rules that need an example call


def pictures() -> dict[str, Drawing]:
    """A rule's name → its picture, SVG."""
    drawings = {}
    for name, (rule, make) in SHOWN.items():
        model = nn.Sequential(OrderedDict(m=make())).eval()
        drawings[name] = draw(apply_rules(model, [rule], example_inputs=EXAMPLES.get(name)), "m", before=False)
    return drawings


def page_pictures() -> dict[str, Drawing]:
    """The pictures of docs/how-to/pictures.md: the models that the page's code makes."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, num_labels=5)  # type: ignore[arg-type,call-arg]
    model = BertForSequenceClassification(config)
    apply_rules(model, [rules.LoraRule(["query", "value"], rank=8, alpha=16), rules.TrainRule("classifier")])
    apply_rules(model, [rules.IA3Rule("key")], adapter="other")
    activate(model, "default")
    site = "bert.encoder.layer.0.attention.self.query"
    return {"page-tree": draw(model), "page-site": draw(model, site)}


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    drawings = pictures() | page_pictures()
    for old in PICTURES.glob("*.svg"):
        if old.stem not in drawings:
            old.unlink()
    for name, text in drawings.items():
        text.save(PICTURES / f"{name}.svg")
    print(f"{len(drawings)} pictures in {PICTURES}")


if __name__ == "__main__":
    main()
