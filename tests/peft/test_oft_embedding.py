"""OFT on embeddings against PEFT: live, trained, merged, and as files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as facade
from surgery import PlanError, adapter_state_dict, apply_rules, load_adapter, merge, save_adapter
from surgery.rules import OftRule
from tests.support.oft import FIELDS, assert_same, in_peft, train
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Words(nn.Module):
    def __init__(self, kind: type[nn.Embedding] = nn.Embedding, **kwargs: Any) -> None:
        super().__init__()
        self.words, self.linear = kind(11, 12, **kwargs), nn.Linear(12, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.words(ids))


TARGETS = ["words", "linear"]
MODELS: dict[str, Any] = {
    "Embedding": Words, "padding": lambda: Words(padding_idx=0), "scaled": lambda: Words(Scaled),
    "bfloat16": lambda: Words().bfloat16(),
}  # fmt: skip
IDS = torch.tensor([[0, 3, 10], [3, 5, 0]])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", FIELDS)
def test_oft_on_an_embedding_is_pefts(case: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    theirs = in_peft(model, IDS, TARGETS, FIELDS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = facade.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs", is_trainable=True)
    assert (theirs(IDS) - model(IDS)).abs().max() > 1e-2
    assert_same(ours(IDS), theirs(IDS))
    train(theirs, IDS)
    train(ours, IDS)
    assert_same(ours(IDS), theirs(IDS))
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert_same(again(IDS), ours(IDS))
    mine, other = ours.merge_and_unload(), theirs.merge_and_unload()
    assert_same(mine.words.weight, other.words.weight)
    assert_same(mine(IDS), other(IDS))


@pytest.mark.parametrize("case", FIELDS)
def test_a_new_adapter_is_pefts(case: str) -> None:
    model = Words()
    ours = facade.get_peft_model(
        copy.deepcopy(model), facade.OFTConfig(target_modules=["words", "linear"], **FIELDS[case])
    )
    assert torch.equal(ours(IDS), model(IDS))
    shapes = {key: tensor.shape for key, tensor in facade.get_peft_model_state_dict(ours).items()}
    theirs = peft.get_peft_model_state_dict(in_peft(model, IDS, TARGETS, FIELDS[case]))
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}


class Squashed(nn.Embedding):
    """Its forward is not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled, Squashed])
def test_live_merged_and_saved_are_one(kind: type[nn.Embedding], tmp_path: Path) -> None:
    model = Words(kind)
    ours: Any = apply_rules(copy.deepcopy(model), [OftRule("words", block_size=4, init="random")])
    live = ours(IDS)
    save_adapter(ours, tmp_path, format="peft")
    again = copy.deepcopy(model)
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), live)
    tensors, R = adapter_state_dict(ours), torch.eye(12)
    assert list(tensors) and tensors[next(iter(tensors))].shape == (3, 6)
    Q = torch.zeros(3, 4, 4)
    Q[:, *torch.triu_indices(4, 4, 1)] = next(iter(tensors.values())).float()
    Q = Q - Q.transpose(-1, -2)
    R = torch.block_diag(*(torch.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q for q in Q))
    merge(ours)
    assert_same(ours.words.weight, model.words.weight @ R)
    assert_same(ours(IDS), live)


def test_blocks_that_do_not_divide_a_row_are_named() -> None:
    with pytest.raises(PlanError, match="block_size=5 does not divide the 12 numbers of each row"):
        apply_rules(Words(), [OftRule("words", block_size=5)])
