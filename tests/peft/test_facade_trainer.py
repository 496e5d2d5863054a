"""PEFT's notebook on image classification, its import line changed: with PEFT, and with `surgery.peft`."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import surgery.peft
from tests.support.peers import peft

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
tiny: Any = pytest.importorskip("tests.support.tiny")
load_file: Any = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and of the Trainer with PEFT


class Pictures(Dataset):
    """Sixteen pictures of noise; the label is the third in which the first picture element's red lies."""

    def __init__(self) -> None:
        self.pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "label": (self.pixels[index, 0, 0, 0] > 0).long()}


def collate_fn(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    return {"pixel_values": pixel_values, "labels": labels}


def compute_metrics(eval_pred: Any) -> dict[str, float]:
    return {"accuracy": float((eval_pred.predictions.argmax(axis=1) == eval_pred.label_ids).mean())}


def base(seed: int = 0) -> Any:
    """As AutoModelForImageClassification.from_pretrained gives it: the same body, and a new head of its own."""
    torch.manual_seed(0)
    model: Any = tiny.vit()[0]
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight)
    return model


def notebook(library: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """The notebook's cells, in their order; what they print or leave is given back."""
    found: dict[str, Any] = {}
    module: Any = importlib.import_module(library)
    LoraConfig, get_peft_model = module.LoraConfig, module.get_peft_model
    PeftConfig, PeftModel = module.PeftConfig, module.PeftModel

    model = base()
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],  # "query", "value" in the notebook: as ViT called them once
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    lora_model = get_peft_model(model, config)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        lora_model.print_trainable_parameters()
    found["printed"] = printed.getvalue()

    args = transformers.TrainingArguments(
        str(folder / "vit-finetuned-lora"),
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        num_train_epochs=3,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        label_names=["labels"],
        use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=3,
        **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        lora_model,
        args,
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        compute_metrics=compute_metrics,
        data_collator=collate_fn,
    )
    found["trained"] = trainer.train()
    found["evaluated"] = trainer.evaluate(Pictures())
    found["trainer"] = trainer

    repo_name = str(folder / "vit-lora")  # lora_model.push_to_hub(repo_name)
    lora_model.save_pretrained(repo_name)

    config = PeftConfig.from_pretrained(repo_name)
    found["config"] = config
    model = base(seed=1)
    inference_model = PeftModel.from_pretrained(model, repo_name)
    encoding = {"pixel_values": Pictures().pixels}
    with torch.no_grad():
        outputs = inference_model(**encoding)
        found["logits"] = outputs.logits
        lora_model.eval()
        found["trained logits"] = lora_model(**encoding).logits
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    made = {}
    for library in ("peft", "surgery.peft"):
        folder = tmp_path_factory.mktemp(library.replace(".", "_"))
        made[library] = (notebook(library, folder), folder)
    return made


def test_the_notebook_runs_with_its_import_line_changed(runs: Any) -> None:
    (theirs, _), (ours, _) = runs["peft"], runs["surgery.peft"]
    assert ours["printed"] == theirs["printed"]
    for found in (theirs, ours):
        assert torch.equal(found["logits"], found["trained logits"])
        losses = [line["loss"] for line in found["trainer"].state.log_history if "loss" in line]
        assert losses[-1] < losses[0]
    assert ours["evaluated"].keys() == theirs["evaluated"].keys()
    assert isinstance(ours["trainer"].model, surgery.peft.PeftModel)
    assert ours["config"].r == theirs["config"].r == 16 and ours["config"].inference_mode
    assert ours["config"].target_modules == theirs["config"].target_modules == {"q_proj", "v_proj"}


def test_its_files_are_pefts(runs: Any) -> None:
    (_, theirs), (found, ours) = runs["peft"], runs["surgery.peft"]
    for place in ("vit-lora", "vit-finetuned-lora/checkpoint-2"):
        a, b = (load_file(folder / place / "adapter_model.safetensors") for folder in (theirs, ours))
        assert {key: tensor.shape for key, tensor in a.items()} == {key: tensor.shape for key, tensor in b.items()}
        a, b = (json.loads((folder / place / "adapter_config.json").read_text()) for folder in (theirs, ours))
        assert a.keys() == b.keys()
        assert a.pop("peft_version").startswith(
            b.pop("peft_version").rpartition(".")[0]
        )  # PEFT's own, and its format's
        assert sorted(a.pop("target_modules")) == sorted(b.pop("target_modules"))
        assert {name: a[name] for name in b} == b
    loaded = peft.PeftModel.from_pretrained(base(seed=2), ours / "vit-lora")
    with torch.no_grad():
        logits = loaded(pixel_values=Pictures().pixels).logits
    torch.testing.assert_close(logits, found["logits"], atol=1e-5, rtol=1e-4)


def test_what_the_trainer_logs_of_the_first_step_is_pefts(runs: Any) -> None:
    """B is zero at the start, so that whatever A is drawn, the first loss is the base's with its new head."""
    first = [run["trainer"].state.log_history[0]["loss"] for run, _ in (runs["peft"], runs["surgery.peft"])]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_training_resumes_to_the_bit(runs: Any) -> None:
    found, folder = runs["surgery.peft"]
    trainer = found["trainer"]
    model = surgery.peft.get_peft_model(base(), trainer.model.peft_config["default"])
    with torch.no_grad():  # what is not loaded would show
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.zero_()
    again = transformers.Trainer(
        model, trainer.args, train_dataset=Pictures(), eval_dataset=Pictures(), data_collator=collate_fn,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(folder / "vit-finetuned-lora" / "checkpoint-2"))
    assert again.state.global_step == trainer.state.global_step == 6
    last = load_file(folder / "vit-finetuned-lora" / "checkpoint-6" / "adapter_model.safetensors")
    logged = [[line for line in t.state.log_history if "loss" in line] for t in (trainer, again)]
    assert [line["loss"] for line in logged[0]] == [line["loss"] for line in logged[1]]
    assert last.keys() == surgery.peft.get_peft_model_state_dict(model).keys()


def test_the_labels_are_found_without_being_named(tmp_path: Path) -> None:
    """The Trainer looks at the model's class and its forward, which a façade does not hide."""
    model = surgery.peft.get_peft_model(tiny.bert()[0], surgery.peft.LoraConfig(task_type="SEQ_CLS", r=2))
    settings = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, settings)
    assert trainer.label_names == ["labels"]
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
