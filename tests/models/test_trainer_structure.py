"""The Trainer on a model with a new head and new tokens: checkpoints hold both, and resuming gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from surgery import apply_rules, load_adapter
from surgery.rules import HeadRule, LoraRule, ResizeVocabRule, TokensRule

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
AdapterCheckpoints: Any = pytest.importorskip("surgery.trainer").AdapterCheckpoints

NEW = [40, 41, 42, 43, 44]
RULES = [
    ResizeVocabRule(tokens=45),
    HeadRule(labels=3),
    TokensRule("word_embeddings", tokens=NEW),
    LoraRule("query", rank=2),
]
IDS = torch.tensor([[41, 3, 44]])


class Sentences(Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 45, (16, 6), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": torch.tensor(index % 3)}


def make_base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))


def train(model: Any, folder: Path, resumed: Path | None = None) -> None:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=[AdapterCheckpoints()])
    trainer.train(resume_from_checkpoint=str(resumed) if resumed is not None else None)


def test_a_run_is_resumed_and_its_checkpoint_loads_on_the_base(tmp_path: Path) -> None:
    whole = apply_rules(make_base(), RULES)
    train(whole, tmp_path / "whole")
    expected = whole.eval()(IDS).logits
    resumed = apply_rules(make_base(), RULES)
    train(resumed, tmp_path / "again", tmp_path / "whole/checkpoint-2")
    assert torch.equal(resumed.eval()(IDS).logits, expected)
    load_adapter(fresh := make_base().eval(), tmp_path / "whole/checkpoint-4")
    assert torch.equal(fresh(IDS).logits, expected)
