"""centre_layer_norm on residual streams: the outputs of the LayerNorms in float64, and back to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, SiteError, SurgeryWarning, apply_rules, commit, remove, rules_from_json, rules_to_json
from surgery.rules import LoraRule
from surgery.rules.rewrites import CentreNormRule, centre_layer_norm
from surgery.testing import Snapshot
from tests.support.families import FAMILIES

D = 8


def randomise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.3)


@pytest.mark.parametrize(("name", "norms"), [("gpt2", 5), ("opt", 5), ("gpt_neox", 5)])
def test_decoders(name: str, norms: int) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = FAMILIES[name].make().eval().double()
    inputs = FAMILIES[name].inputs()
    randomise(model)
    before = model(**inputs)[0]
    rule = centre_layer_norm(model, inputs)
    assert rules_from_json(rules_to_json([rule])) == [rule]
    snapshot, config = Snapshot(model), model.config.to_dict()
    apply_rules(model, rule)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.RMSNorm) == norms and nn.LayerNorm not in kinds
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied is model.config.tie_word_embeddings is (name == "opt")  # OPT's embedding does not write to the stream
    after = model(**inputs)[0]
    assert torch.allclose(after, before, rtol=1e-12, atol=1e-12)  # sums of other orders in float64
    committed = copy.deepcopy(model)
    with pytest.warns(SurgeryWarning, match="is an RMSNorm"):
        commit(committed)
    assert torch.equal(committed(**inputs)[0], after)
    remove(model)
    assert not snapshot.differences(model)
    assert torch.equal(model(**inputs)[0], before) and model.config.to_dict() == config


class Block(nn.Module):
    """A pre-norm block. `use`: another use of the stream."""

    def __init__(self, use: str = "") -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D)
        self.use, self.gate = use, nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(self.norm(x)).relu())
        if self.use == "gate":
            return x + y * self.gate(x)
        if self.use == "factor":
            return x + y * y
        if self.use == "number":
            return x + y + 1.0
        if self.use == "split":
            return (x.view(-1, 2, D // 2) * 1.0).view(x.shape) + y
        return x + y


class Model(nn.Module):
    def __init__(self, use: str = "") -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, D), nn.ModuleList([Block(use), Block()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 11, bias=False)
        self.head.weight = self.embed.weight
        randomise(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(11)[None]


def test_a_stream_of_a_tied_model() -> None:
    model: Any = Model().double()
    before = model(IDS)
    rule = centre_layer_norm(model, IDS)
    assert rule.norms == {"embed": ("blocks.0.norm",), "blocks.0.down": ("blocks.1.norm",), "blocks.1.down": ("norm",)}
    assert rule.readers == {"blocks.0.norm": ("blocks.0.up",), "blocks.1.norm": ("blocks.1.up",), "norm": ("head",)}
    snapshot = Snapshot(model)
    apply_rules(model, rule)
    assert torch.allclose(model(IDS), before, rtol=1e-12, atol=1e-12)
    assert model.head.weight is not model.embed.weight and model.head.bias is not None
    apply_rules(model, LoraRule("head", rank=2), adapter="second")
    remove(model, "second")
    remove(model)
    assert not snapshot.differences(model)
    assert model.head.weight is model.embed.weight and torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        ("gate", "blocks.0.gate reads the stream"),
        ("factor", "computes blocks.0.mul by mul"),
        ("number", "a number is added"),
        ("split", "reads the stream"),
    ],
)
def test_other_uses_of_a_stream(use: str, why: str) -> None:
    """Norms before the use read a stream that cannot be centred; none of the norms may go wrong."""
    model = Model(use).double()
    before = model(IDS)
    try:
        rule = centre_layer_norm(model, IDS)
    except SiteError as error:
        assert why in str(error)
        return
    apply_rules(model, rule)
    assert torch.allclose(model(IDS), before, rtol=1e-12, atol=1e-12)
    assert use in ("factor", "number")


class Decoder(nn.Module):
    def forward(self, x: Tensor, layer: nn.Embedding) -> Tensor:
        return x @ layer.weight.t()


def test_a_layer_whose_weight_another_module_reads_is_not_centred() -> None:
    """As in Perceiver: the decoder gets the embedding, and multiplies by its weight."""

    class Decoding(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.head
            self.decoder = Decoder()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.decoder(self.norm(x), self.embed)

    model = Decoding().double()
    with pytest.raises(SiteError, match="decoder reads the stream"):
        centre_layer_norm(model, IDS)


def test_a_stream_without_one_of_its_layers_is_refused() -> None:
    model = Model()
    rule = centre_layer_norm(model, IDS)
    with pytest.raises(PlanError, match="blocks.0.down is excluded, and it writes to the same residual stream"):
        apply_rules(model, CentreNormRule(norms=rule.norms, readers=rule.readers, exclude="blocks.0.down"))
    assert not any(isinstance(module, nn.RMSNorm) for module in model.modules())


def test_post_norms_stay_and_the_reason_is_told() -> None:
    pytest.importorskip("transformers")
    model = FAMILIES["bert"].make().eval()
    randomise(model)
    with pytest.raises(SiteError, match="more norms"):
        centre_layer_norm(model, FAMILIES["bert"].inputs())
