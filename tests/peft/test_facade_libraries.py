"""trl and sentence-transformers with `surgery.peft`, beside PEFT. Skipped where they are not installed."""

from __future__ import annotations

import importlib
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import SurgeryError
from tests.support.facade_models import out, same_adapters
from tests.support.peers import peft, transformers
from tests.support.words import words

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
CLOSE = 1e-6  # of losses in float32, whose sums may have another order


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a data set of columns. Each has a fingerprint of its own, since dill can't hash what trl maps with."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    fingerprint: Any = pytest.importorskip("datasets.fingerprint")
    numbers = itertools.count()
    monkeypatch.setattr(fingerprint.Hasher, "hash", classmethod(lambda cls, value: f"{next(numbers):016x}"))
    return datasets.Dataset.from_dict


def sizes(**more: Any) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaConfig(vocab_size=64, pad_token_id=0, **small, **more)


def language_model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(sizes())


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    always: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0, "max_steps": 3}
    quietly: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    return kind(output_dir=str(folder), **{**always, **quietly, "save_strategy": "no", "bf16": False, **settings})


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def adapted(make_config: Callable[[Any], Any]) -> tuple[Any, Any]:
    """PEFT's model and a façade, with the same tensors."""
    theirs = peft.get_peft_model(language_model(), make_config(peft))
    mine = ours.get_peft_model(language_model(), make_config(ours))
    same_adapters(theirs, mine)
    return theirs, mine


# trl ----------------------------------------------------------------------------------------------------------------

TEXTS = {"text": [" ".join(f"w{i * j % 60}" for j in range(1, 12)) for i in range(1, 17)]}
PAIRS: dict[str, list[Any]] = {
    "prompt": [f"w{i} w{i + 1}" for i in range(16)],
    "chosen": [f" w{i * 3 % 60} w{i * 7 % 60}" for i in range(16)],
    "rejected": [f" w{i * 5 % 60}" for i in range(16)],
    "completion": [f" w{i * 3 % 60} w{i * 7 % 60}" for i in range(16)],
    "label": [i % 2 == 0 for i in range(16)],
}
CONFIGS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda lib: lib.LoraConfig(**FIELDS, task_type="CAUSAL_LM"),
    "a head of its own": lambda lib: lib.LoraConfig(**FIELDS, task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "DoRA": lambda lib: lib.LoraConfig(**FIELDS, task_type="CAUSAL_LM", use_dora=True),
    "IA3": lambda lib: lib.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "prefix": lambda lib: lib.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed")


@pytest.mark.parametrize("method", CONFIGS)
def test_sft_of_a_facade_has_pefts_losses(method: str, trl: Any, data: Any, tmp_path: Path) -> None:
    runs = []
    for model in adapted(CONFIGS[method]):
        settings = arguments(trl.SFTConfig, tmp_path, gradient_checkpointing=method == "LoRA")
        trainer = trl.SFTTrainer(model, args=settings, train_dataset=data(TEXTS), processing_class=words())
        trainer.train()
        runs.append(losses(trainer))
        assert trainer.model is model
    assert runs[1] == pytest.approx(runs[0], rel=CLOSE) and len({*runs[1]}) == 3


def test_sft_takes_our_configuration(trl: Any, data: Any, tmp_path: Path) -> None:
    """trl makes PEFT's model of it."""
    runs = []
    for library in (peft, ours):
        torch.manual_seed(1)
        trainer = trl.SFTTrainer(
            language_model(), args=arguments(trl.SFTConfig, tmp_path), train_dataset=data(TEXTS),
            processing_class=words(), peft_config=library.LoraConfig(**FIELDS, task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_a_run_of_sft_is_resumed(trl: Any, data: Any, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        torch.manual_seed(1)
        model = ours.get_peft_model(language_model(), CONFIGS["a head of its own"](ours))
        settings = arguments(trl.SFTConfig, tmp_path / folder, save_strategy="steps", save_steps=1)
        trainer = trl.SFTTrainer(model, args=settings, train_dataset=data(TEXTS), processing_class=words())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, again = run("whole"), run("again", str(tmp_path / "whole" / "checkpoint-1"))
    assert losses(again) == losses(whole)
    again.save_model(str(tmp_path / "saved"))
    read = peft.PeftModel.from_pretrained(language_model(), tmp_path / "saved")
    example = {"input_ids": torch.tensor([[5, 6, 7]])}
    torch.testing.assert_close(out(read.eval(), example), out(again.model.eval(), example), atol=2e-5, rtol=1e-4)


def distinct(completions: list[str], **rest: Any) -> list[float]:
    return [float(len({*text.split()})) for text in completions]


GROUPS: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}
TRAINERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "DPO": ("DPO", ("prompt", "chosen", "rejected"), {}),
    "DPO, its reference ahead": ("DPO", ("prompt", "chosen", "rejected"), {"precompute_ref_log_probs": True}),
    "KTO": ("KTO", ("prompt", "completion", "label"), {}),
    "GRPO": ("GRPO", ("prompt",), {**GROUPS, "beta": 0.1}),
    "RLOO": ("RLOO", ("prompt",), GROUPS),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_other_trainers_of_a_facade_log_what_they_log_with_peft(name: str, trl: Any, data: Any, tmp_path: Path) -> None:
    """The reference is the model with its adapters disabled."""
    kind, columns, settings = TRAINERS[name]
    runs = []
    for model in adapted(CONFIGS["LoRA"]):
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=arguments(getattr(trl, f"{kind}Config"), tmp_path, **settings),
            train_dataset=data({column: PAIRS[column] for column in columns}), processing_class=words(),
            **({"reward_funcs": distinct} if settings.get("num_generations") else {}),
        )  # fmt: skip
        trainer.train()
        history = [line for line in trainer.state.log_history if "loss" in line]
        runs.append([line.get(value, 0.0) for line in history for value in ("loss", "reward", "kl", "rewards/margins")])
    assert len({*runs[1]}) > 2 and runs[1] == pytest.approx(runs[0], rel=CLOSE, abs=CLOSE)


def test_a_reward_model_has_pefts_losses(trl: Any, data: Any, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(sizes(num_labels=1))

    theirs, mine = (lib.get_peft_model(base(), lib.LoraConfig(**FIELDS, task_type="SEQ_CLS")) for lib in (peft, ours))
    same_adapters(theirs, mine)
    runs = []
    for model in (theirs, mine):
        tokenizer = words()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        pairs = data({column: PAIRS[column] for column in ("chosen", "rejected")})
        settings = arguments(trl.RewardConfig, tmp_path)
        trainer = trl.RewardTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=CLOSE) and len({*runs[1]}) == 3


# A fused output layer, as trl's forward has it ----------------------------------------------------------------------


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x))


def fuse(model: Any) -> Any:
    """As trl does: another forward, set on the model when adapters are on it, computes with the head's weight."""
    forward = type(model.get_base_model()).forward

    def fused(self: Any, x: Tensor, fused_lm_head: bool = False) -> Tensor:
        if not fused_lm_head:
            return forward(self, x)
        head = self.get_output_embeddings()
        return nn.functional.linear(self.body(x), head.weight, head.bias)

    model.get_base_model().forward = types.MethodType(fused, model.get_base_model())
    return model


def fused(**fields: Any) -> Any:
    return fuse(ours.get_peft_model(Headed(), ours.LoraConfig(r=2, init_lora_weights=False, **fields)))


def test_a_fused_head_is_the_trained_copy() -> None:
    model = fused(target_modules=["body"], modules_to_save=["lm_head"])
    x, head = torch.randn(3, 4), model.lm_head
    torch.nn.init.normal_(head.adapters.default.weight)
    torch.testing.assert_close(model(x, fused_lm_head=True), model(x))
    model(x, fused_lm_head=True).sum().backward()
    assert head.adapters.default.weight.grad.abs().sum() > 0 and head.adapters.default.bias.grad is not None
    assert head.weight.grad is None and model.get_output_embeddings() is head
    assert "get_output_embeddings" not in model.__dict__
    with model.disable_adapter():
        torch.testing.assert_close(model(x, fused_lm_head=True), Headed()(x))
    torch.testing.assert_close(model.forward(x, fused_lm_head=True), model(x))


def test_other_adapters_on_a_fused_head_are_refused() -> None:
    model = fused(target_modules=["body", "lm_head"])
    x = torch.randn(3, 4)
    with pytest.raises(SurgeryError, match="'lm_head' would have no effect") as caught:
        model(x, fused_lm_head=True)
    assert isinstance(caught.value, ValueError) and "modules_to_save=['lm_head']" in str(caught.value)
    assert model(x).shape == (3, 6) and model.merge_adapter() is None
    torch.testing.assert_close(model(x, fused_lm_head=True), model(x))  # the weight holds it now


# sentence-transformers ----------------------------------------------------------------------------------------------

SENTENCES = ["w1 w2 w3", "w5"]


@pytest.fixture
def st() -> Any:
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@pytest.fixture
def encoder(st: Any, tmp_path: Path) -> Callable[..., Any]:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **small)).save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    return lambda folder="base": st.SentenceTransformer(str(tmp_path / folder), device="cpu")


def trained(st: Any, model: Any, data: Any, folder: Path) -> list[float]:
    pairs = data({"anchor": PAIRS["prompt"], "positive": PAIRS["chosen"]})
    settings = arguments(st.SentenceTransformerTrainingArguments, folder, save_strategy="steps", save_steps=2)
    loss = importlib.import_module("sentence_transformers.losses").MultipleNegativesRankingLoss(model)
    trainer = st.SentenceTransformerTrainer(model, settings, train_dataset=pairs, loss=loss)
    trainer.train()
    return losses(trainer)


TEXT_FIELDS: dict[str, Any] = {**FIELDS, "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}


def test_sentence_transformers_adds_trains_and_loads(st: Any, encoder: Any, data: Any, tmp_path: Path) -> None:
    """`add_adapter` makes PEFT's layers of our configuration."""
    runs = []
    for library in (peft, ours):
        model = encoder()
        torch.manual_seed(1)
        model.add_adapter(library.LoraConfig(**TEXT_FIELDS))
        runs.append(trained(st, model, data, tmp_path / "runs"))
        model.save(str(tmp_path / "saved"))
        assert torch.equal(*(torch.as_tensor(m.encode(SENTENCES)) for m in (model, encoder("saved"))))
    assert runs[0] == runs[1]


def test_sentence_transformers_loads_our_folders(encoder: Any, tmp_path: Path) -> None:
    model: Any = ours.get_peft_model(encoder()[0].model, ours.LoraConfig(**TEXT_FIELDS))
    model.save_pretrained(tmp_path / "adapter")
    inside, loaded = encoder(), encoder()
    inside[0].model = model.eval()
    loaded.load_adapter(str(tmp_path / "adapter"))
    encoded = [torch.as_tensor(m.encode(SENTENCES)) for m in (inside, loaded, encoder())]
    torch.testing.assert_close(encoded[0], encoded[1])
    assert not torch.allclose(encoded[0], encoded[2], atol=1e-3)


def test_a_facade_inside_of_sentence_transformers(st: Any, encoder: Any, data: Any, tmp_path: Path) -> None:
    runs, models = [], [encoder(), encoder()]
    theirs = peft.get_peft_model(models[0][0].model, peft.LoraConfig(**TEXT_FIELDS))
    mine = ours.get_peft_model(models[1][0].model, ours.LoraConfig(**TEXT_FIELDS))
    same_adapters(theirs, mine)
    for model, inner in zip(models, (theirs, mine), strict=True):
        model[0].model = inner
        runs.append(trained(st, model, data, tmp_path / "runs"))
    assert runs[1] == pytest.approx(runs[0], rel=CLOSE)
    models[1].save(str(tmp_path / "saved"))
    torch.testing.assert_close(*(torch.as_tensor(m.encode(SENTENCES)) for m in (models[1], encoder("saved"))))
