"""transformers' Trainer on a rewritten model: its checkpoints hold the adapters, and resuming gives the same bits."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import surgery.peft
from surgery import (
    SurgeryWarning,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    load_adapter,
    merge,
    merge_to,
    remove,
    unmerge,
)
from surgery.rules import LoraRule, TrainRule
from surgery.testing import Snapshot

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
tiny: Any = pytest.importorskip("tests.support.tiny")
load_file: Any = pytest.importorskip("safetensors.torch").load_file
AdapterCheckpoints: Any = pytest.importorskip("surgery.trainer").AdapterCheckpoints

RULES = [LoraRule(["query", "value"], rank=4, alpha=8, dropout=0.1), TrainRule("classifier")]
STEPS = 6


class Sentences(Dataset):
    """Sixteen sentences of random tokens; the label is whether the first token's number is even."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 99, (16, 7), generator=draw)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 2}


def make_adapted() -> nn.Module:
    torch.manual_seed(0)
    return apply_rules(tiny.bert()[0], RULES)


def trainer_of(model: nn.Module, folder: Path, callbacks: Any = None, **settings: Any) -> Any:
    chosen = {
        "max_steps": STEPS, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3,
        "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[AdapterCheckpoints()] if callbacks is None else callbacks,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, nn.Module, Path]]:
    """One uninterrupted run: the trainer, the base as it was before, and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    model = make_adapted()
    base = remove(copy.deepcopy(model))
    trainer = trainer_of(model, folder)
    trainer.train()
    yield trainer, base, folder


def test_training_moves_the_adapter_and_leaves_the_base(run: tuple[Any, nn.Module, Path]) -> None:
    trainer, base, _ = run
    start, end = adapter_state_dict(make_adapted()), adapter_state_dict(trainer.model)
    assert start.keys() == end.keys()
    assert all(not torch.equal(tensor, end[name]) for name, tensor in start.items())
    now = base_state_dict(trainer.model)
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.state_dict().items())
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def trains(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if ".adapters." in name}


def test_checkpoints_hold_the_adapter_and_not_the_base(run: tuple[Any, nn.Module, Path]) -> None:
    trainer, base, folder = run
    for step in (3, 6):
        place = folder / f"checkpoint-{step}"
        saved_tensors = load_file(place / "model.safetensors")
        assert saved_tensors.keys() == trains(trainer.model)
        assert not (place / "config.json").exists()
        assert sum(file.stat().st_size for file in place.glob("*.safetensors")) < 60_000
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in saved_tensors.items())
    check_all_open(trainer.model, base, folder / "checkpoint-6")


def check_all_open(model: Any, base: Any, place: Path) -> None:
    """Loaded by us, the façade and PEFT: each gives the trained model's logits on the original base."""
    batch = {"input_ids": Sentences().ids}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        plain = base.eval()(**batch).logits
        assert (expected - plain).abs().max() > 0.05
        load_adapter(ours := copy.deepcopy(base), place)
        assert torch.equal(ours(**batch).logits, expected)
        facade = surgery.peft.PeftModel.from_pretrained(copy.deepcopy(base), place)
        assert torch.equal(facade.eval()(**batch).logits, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of PEFT
            peft: Any = pytest.importorskip("peft")
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(place)).eval()
        torch.testing.assert_close(theirs(**batch).logits, expected)


def test_resuming_gives_the_bits_of_the_uninterrupted_run(run: tuple[Any, nn.Module, Path], tmp_path: Path) -> None:
    whole, _, folder = run
    model = make_adapted()
    with torch.no_grad():  # values that are not loaded change the output
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.zero_()
    trainer = trainer_of(model, tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert trainer.state.global_step == STEPS
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    late = [line["loss"] for line in whole.state.log_history if "loss" in line][3:]
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line][3:] == late


def test_after_training_the_adapter_is_saved(run: tuple[Any, nn.Module, Path], tmp_path: Path) -> None:
    trainer, base, _ = run
    for name, save in (("own", trainer.model.save_pretrained), ("trainer", trainer.save_model)):
        save(tmp_path / name)
        written = {file.name for file in (tmp_path / name).iterdir()}
        assert written - {"training_args.bin"} == {"adapter_config.json", "adapter_model.safetensors"}
        check_all_open(trainer.model, base, tmp_path / name)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_save_the_adapter_too(again: Any, tmp_path: Path) -> None:
    model: Any = make_adapted()
    trainer_of(model, tmp_path)
    again(model).save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "own")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_a_merged_model_is_saved_whole(run: tuple[Any, nn.Module, Path], tmp_path: Path) -> None:
    trainer, base, _ = run
    batch = {"input_ids": Sentences().ids}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        merge(trainer.model)
        trainer.save_model(tmp_path / "merged")
        unmerge(trainer.model)
        merge_to(trainer.model, tmp_path / "as well")
        for name in ("merged", "as well"):
            loaded, report = type(base).from_pretrained(tmp_path / name, output_loading_info=True)  # type: ignore[attr-defined]
            assert not any(report.values()), report
            torch.testing.assert_close(loaded.eval()(**batch).logits, expected)


def test_evaluation_and_prediction(run: tuple[Any, nn.Module, Path]) -> None:
    trainer, base, _ = run
    prediction = trainer.predict(Sentences())
    batch = {"input_ids": Sentences().ids, "labels": Sentences().ids[:, 0] % 2}
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(**batch)
        plain = base.eval()(**batch)
    torch.testing.assert_close(torch.tensor(prediction.predictions), expected.logits)
    assert (expected.logits - plain.logits).abs().max() > 0.05
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    merge(model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    unmerge(model)
    assert torch.equal(torch.tensor(trainer.predict(Sentences()).predictions), torch.tensor(prediction.predictions))


def test_resuming_without_the_callback_is_not_silent(tmp_path: Path) -> None:
    """Such checkpoints contain only the base: the Trainer reports the tensors that it did not find."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger("transformers").addHandler(ear)
    try:
        for callback in (True, False):
            folder = tmp_path / str(callback)
            for resume in (None, str(folder / "checkpoint-3")):
                trainer = trainer_of(make_adapted(), folder)
                if not callback:
                    trainer = trainer_of(make_adapted(), folder, callbacks=[])
                with nullcontext() if callback else pytest.warns(SurgeryWarning, match="leaves out its adapters"):
                    trainer.train(resume_from_checkpoint=resume)
            missing = [line for line in heard if "missing keys" in line]
            assert len(missing) == (0 if callback else 1), heard
            assert all("adapters.default" in line for line in missing)
    finally:
        logging.getLogger("transformers").removeHandler(ear)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_the_best_model(reentrant: bool, tmp_path: Path) -> None:
    model = make_adapted()
    trainer = trainer_of(
        model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=0.5,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert best.keys() == trains(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in best.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_removed_after_training_it_is_the_model_from_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.bert()[0]
    before = Snapshot(model)
    mode = model.training
    trainer_of(apply_rules(model, RULES), tmp_path, save_strategy="no").train()
    differences = before.differences(remove(model).train(mode))
    # The Trainer itself sets attributes and the mode of a model.
    assert all("attributes of" in line or "mode of" in line for line in differences), differences
    assert not any("_surgery" in key for module in model.modules() for key in vars(module))
