"""The Trainer with façades: losses, checkpoints, resumed runs and the best checkpoint, beside PEFT's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import surgery.peft as ours
from surgery import SurgeryError, SurgeryWarning
from tests.support.facade_models import llama, tiny
from tests.support.peers import peft, transformers

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
load_file: Any = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and of the Trainer with PEFT

STEPS = 4
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
DRAWN: dict[str, Any] = {**FIELDS, "init_lora_weights": False}


class Texts(Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 50, (16, 9), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def one(library: Any, **fields: Any) -> Any:
    return library.get_peft_model(llama()[0], library.LoraConfig(**{**DRAWN, **fields}))


def named(library: Any) -> Any:
    """The one adapter is not "default": PEFT writes it into a subfolder."""
    return library.get_peft_model(llama()[0], library.LoraConfig(**DRAWN), adapter_name="other")


def second(library: Any) -> Any:
    """The second of two adapters is trained, the first is idle."""
    model = one(library)
    model.add_adapter("other", library.LoraConfig(**DRAWN))
    model.set_adapter("other")
    return model


def together(library: Any) -> Any:
    """Two adapters are trained together."""
    model = one(library)
    model.add_adapter("other", library.LoraConfig(**{**DRAWN, "target_modules": ["k_proj"]}))
    model.base_model.set_adapter(["default", "other"])
    return model


def head(library: Any) -> Any:
    """A copy of the head is trained, too."""
    return one(library, modules_to_save=["lm_head"])


def base(library: Any) -> Any:
    """A weight of the base is trained, too."""
    model = one(library)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    return model


CASES: dict[str, Callable[[Any], Any]] = {f.__name__: f for f in (one, named, second, together, head, base)}


def some(*names: str, of: Sequence[str] = tuple(CASES)) -> list[Any]:
    """The cases; `make slow` runs those that are not named."""
    slow = pytest.mark.slow("an adapter that is added second, and one with a head, take the same steps")
    return [name if name in names else pytest.param(name, marks=slow) for name in of]


PEFT_LOSES = ("named", "second", "together", "base")  # what was trained, where it takes the best checkpoint back


def run(model: Any, folder: Path, resume: Path | None = None, **settings: Any) -> Any:
    """Trains a few steps with a checkpoint each. The first is the best, so it must be taken back from the last."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=3e-2, seed=0, report_to=[],
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1, save_steps=1, eval_steps=1,
        eval_strategy="steps", save_strategy="steps", **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def best(model: Any, folder: Path, resume: Path | None = None) -> Any:
    """The same, with the checkpoint of the highest loss taken back at the end."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    return run(model, folder, resume, **options)


def logged(trainer: Any, what: str = "loss") -> list[float]:
    return [line[what] for line in trainer.state.log_history if what in line]


def highest(trainer: Any) -> float:
    """The loss of the best checkpoint, which is not the last one."""
    *_, last = losses = logged(trainer, "eval_loss")[:STEPS]
    assert len(losses) == STEPS and max(losses) != last
    return max(losses)


def at_end(trainer: Any) -> float:
    """The loss of the model as the training left it."""
    return trainer.evaluate()["eval_loss"]


def tensors_of(model: Any) -> dict[str, dict[str, Tensor]]:
    states = {name: peft.get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config}
    return {name: {key: t.clone() for key, t in state.items()} for name, state in states.items()}


def put(model: Any, states: dict[str, dict[str, Tensor]]) -> Any:
    for name, state in states.items():
        assert ours.set_peft_model_state_dict(model, state, adapter_name=name) == ([], [])
    return model


@pytest.mark.parametrize("case", some("second", "head"))
def test_the_trainer_trains_saves_resumes_and_takes_the_best_back(case: str, tmp_path: Path) -> None:
    make = CASES[case]
    theirs = make(peft)
    start = tensors_of(theirs)
    reference = best(theirs, tmp_path / "theirs")
    trainer = best(put(make(ours), start), tmp_path / "ours")
    for what in ("loss", "eval_loss"):
        assert logged(trainer, what) == pytest.approx(logged(reference, what), rel=1e-6)
    assert at_end(trainer) == highest(trainer)
    assert (at_end(reference) == highest(reference)) is (case not in PEFT_LOSES)

    again = best(make(ours), tmp_path / "again", tmp_path / "ours" / "checkpoint-2")
    for what in ("loss", "eval_loss"):
        assert logged(again, what)[:STEPS] == logged(trainer, what)[:STEPS]
    assert at_end(again) == highest(trainer)


@pytest.mark.parametrize("case", some("second", "head", of=("one", "named", "second", "head")))
def test_a_run_of_pefts_is_resumed(case: str, tmp_path: Path) -> None:
    """A checkpoint that PEFT wrote has the optimizer's state in the same order."""
    theirs = CASES[case](peft)
    reference = run(theirs, tmp_path / "theirs")
    again = run(CASES[case](ours), tmp_path / "ours", tmp_path / "theirs" / "checkpoint-2")
    assert again.state.global_step == STEPS
    for what in ("loss", "eval_loss"):
        assert logged(again, what) == pytest.approx(logged(reference, what), rel=1e-6)


def test_the_best_of_a_run_that_peft_began_is_taken_back(tmp_path: Path) -> None:
    """The adapter lies in a subfolder; PEFT reads the other adapter of the checkpoint in its place."""
    reference = best(second(peft), tmp_path / "theirs")
    again = best(second(ours), tmp_path / "ours", tmp_path / "theirs" / "checkpoint-2")
    assert again.state.best_model_checkpoint == str(tmp_path / "theirs" / "checkpoint-1")
    assert at_end(again) == pytest.approx(highest(reference), rel=1e-6)


def gpt2() -> Any:
    torch.manual_seed(0)
    return tiny.gpt2()[0]


METHODS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "PiSSA": lambda: (llama()[0], ours.LoraConfig(**FIELDS, init_lora_weights="pissa")),
    "DoRA": lambda: (llama()[0], ours.LoraConfig(**FIELDS, use_dora=True)),
    "AdaLoRA": lambda: (llama()[0], ours.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=2)),
    "IA3": lambda: (llama()[0], ours.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "prompt": lambda: (llama()[0], ours.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    "a format of its own": lambda: (gpt2(), ours.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_best_is_taken_back_to_the_bit_with_every_method(method: str, tmp_path: Path) -> None:
    """PiSSA's weights of the base are brought back, too; a prefix on GPT-2 has no file of PEFT's."""
    model, config = METHODS[method]()
    adapted = ours.get_peft_model(model, config)
    trainer = best(adapted, tmp_path)
    assert at_end(trainer) == highest(trainer)
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    state = adapted.get_base_model().state_dict()
    assert saved and all(torch.equal(state[key], tensor) for key, tensor in saved.items())


class Normed(nn.Module):
    """A model that is not of transformers, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(9), nn.Linear(8, 50)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embed(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_that_is_not_of_transformers_keeps_its_statistics(tmp_path: Path) -> None:
    model = ours.get_peft_model(Normed(), ours.LoraConfig(r=2, target_modules=["head"]))
    trainer = best(model, tmp_path / "first")
    assert at_end(trainer) == highest(trainer)
    assert (tmp_path / "first" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    again = ours.get_peft_model(Normed(), ours.LoraConfig(r=2, target_modules=["head"]))
    resumed = best(again, tmp_path / "again", tmp_path / "first" / "checkpoint-2")
    for what in ("loss", "eval_loss"):
        assert logged(resumed, what)[:STEPS] == logged(trainer, what)[:STEPS]


# load_adapter of a checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the adapters "default" and "other", the second one live."""
    model = second(ours)
    folder = tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    return folder


def values(model: Any, name: str) -> list[Tensor]:
    return [t.clone() for t in ours.get_peft_model_state_dict(model, adapter_name=name).values()]


def test_a_checkpoint_leaves_idle_adapters_alone(checkpoint: Path) -> None:
    model = second(ours)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.shape[0] == 4 or parameter.shape[-1] == 4:  # the adapters'
            nn.init.normal_(parameter.data)
    idle, live = values(model, "default"), values(model, "other")
    model.load_adapter(checkpoint, "other", is_trainable=True)
    assert all(map(torch.equal, values(model, "default"), idle))
    assert not any(map(torch.equal, values(model, "other"), live))
    assert all(map(torch.equal, values(model, "other"), values(ours.PeftModel.from_pretrained(
        llama()[0], checkpoint / "other"), "default")))  # fmt: skip


def test_a_checkpoint_of_other_settings_brings_what_it_computes(checkpoint: Path) -> None:
    """Its lora_alpha is another one: the tensors alone would not compute the same."""
    model = one(ours, lora_alpha=32)
    model.load_adapter(checkpoint, "default")
    expected = ours.PeftModel.from_pretrained(llama()[0], checkpoint)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_adapters_that_were_trained_together_are_told_of(tmp_path: Path) -> None:
    model = together(ours)
    model.save_pretrained(tmp_path / "checkpoint-3")
    expected = values(model, "other")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    with pytest.warns(SurgeryWarning, match="beside 'default' it brings back 'other'"):
        model.load_adapter(tmp_path / "checkpoint-3", "default")
    assert all(map(torch.equal, values(model, "other"), expected))


def test_a_damaged_checkpoint_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    model = second(ours)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for file in checkpoint.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SurgeryError):
        model.load_adapter(checkpoint, "other")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
