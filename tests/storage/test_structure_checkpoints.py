"""What a Trainer with `AdapterCheckpoints` writes of models with structural rules, and how a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from surgery import apply_rules, load_adapters, load_surgery
from surgery.rules import DropRule, HeadRule, LoraRule, ReorderRule
from surgery.trainer import AdapterCheckpoints

pytest.importorskip("accelerate")
IDS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": index % 5} for index, row in enumerate(IDS)]


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config).eval()


def trained(model: Any, folder: Path, steps: int = 4, **resume: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.05, logging_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=DATA, callbacks=[AdapterCheckpoints()])  # type: ignore[arg-type]
    trainer.train(**resume)
    return trainer


def cut(seed: int = 0) -> Any:
    """A head of another size, whose start is random, a cut, and LoRA."""
    model = bert()
    torch.manual_seed(seed)
    apply_rules(model, DropRule("bert.encoder.layer.1"), adapter="cut")
    return apply_rules(model, [HeadRule(labels=5), LoraRule("query", rank=2)])


def test_a_run_is_written_and_read(tmp_path: Path) -> None:
    model = cut()
    trainer = trained(model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "end"))
    model.eval()
    assert sorted(file.name for file in (tmp_path / "end").iterdir() if file.is_dir()) == ["cut"]
    for folder in (tmp_path / "end", tmp_path / "run" / "checkpoint-4"):
        other = bert()
        load_adapters(other, folder)
        assert torch.equal(other.eval()(IDS).logits, model(IDS).logits)


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = cut()
    trained(whole, tmp_path / "whole")
    trained(cut(), tmp_path / "half", steps=2)
    resumed = cut(seed=7)  # the new head starts with other numbers
    trained(resumed, tmp_path / "half", resume_from_checkpoint=True)
    assert torch.equal(resumed.eval()(IDS).logits, whole.eval()(IDS).logits)


def test_one_structure_after_another(tmp_path: Path) -> None:
    model = apply_rules(bert(), [DropRule("bert.encoder.layer.1"), LoraRule("query", rank=2)], adapter="a")
    apply_rules(model, ReorderRule("bert.encoder.layer", order=[2, 1, 0]), adapter="b")
    data = [{**item, "labels": item["labels"] % 2} for item in DATA]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[AdapterCheckpoints()]).train()  # type: ignore[arg-type]
    other = load_surgery(bert(), tmp_path / "checkpoint-1")
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)
