"""Fields of PEFT's configuration that no rule has stay with a loaded adapter, as they stay in PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import surgery
from surgery import (
    apply_rules,
    combine,
    copy_adapter,
    load_adapter,
    remove,
    rename_adapter,
    save_adapter,
)
from surgery.rules import LoraRule, TrainRule
from surgery.state.records import model_state

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
KEPT: dict[str, Any] = {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/base", "revision": "abc"}


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=16, **sizes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = peft.LoraConfig(**KEPT, r=2, target_modules=["query"], modules_to_save=["classifier"])
    base: Any = model()
    base.name_or_path = KEPT["base_model_name_or_path"]
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    return tmp_path / "peft"


def fields(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return {name: settings[name] for name in KEPT}


def test_the_next_save_has_the_task_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    ours = model()
    load_adapter(ours, checkpoint)
    again = save_adapter(ours, tmp_path / "again", config={"revision": "later"})
    assert fields(again) == {**KEPT, "revision": "later"}
    assert json.loads((again / "adapter_config.json").read_text())["auto_mapping"] is None
    theirs = peft.PeftModel.from_pretrained(model(), str(again))
    assert type(theirs) is peft.PeftModelForSequenceClassification
    other = save_adapter(ours, tmp_path / "other", config={"task_type": None})
    assert fields(other) == {**KEPT, "task_type": None}
    whole = save_adapter(ours, tmp_path / "whole", config={**theirs.peft_config["default"].to_dict(), "revision": None})
    assert fields(whole) == {**KEPT, "revision": None}  # a whole configuration replaces the file's


def test_the_configuration_of_the_call_counts_on_loading(checkpoint: Path, tmp_path: Path) -> None:
    ours, config = model(), json.loads((checkpoint / "adapter_config.json").read_text())
    load_adapter(ours, checkpoint, config={**config, "task_type": "FEATURE_EXTRACTION", "revision": None})
    wanted = {**KEPT, "task_type": "FEATURE_EXTRACTION", "revision": None}
    assert fields(save_adapter(ours, tmp_path / "again")) == wanted


def test_the_fields_stay_with_the_adapter(checkpoint: Path, tmp_path: Path) -> None:
    ours = model()
    load_adapter(ours, checkpoint)
    for number, same in enumerate((copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)))):
        assert fields(save_adapter(same, tmp_path / f"{number}")) == KEPT
    rename_adapter(ours, "default", "news")
    copy_adapter(ours, "news", "sports")
    surgery.deactivate(ours)
    load_adapter(ours, save_adapter(ours, tmp_path / "own", "sports", format="surgery"), "again")
    combine(ours, {"news": 0.5, "sports": 0.5}, "both")
    for name in ("news", "sports", "again", "both"):
        assert fields(save_adapter(ours, tmp_path / name, name)) == KEPT
    remove(ours, "news")
    apply_rules(ours, LoraRule("query", rank=2), adapter="news")
    assert fields(save_adapter(ours, tmp_path / "new", "news"))["task_type"] is None


def test_adapters_that_differ_leave_the_field_out(checkpoint: Path, tmp_path: Path) -> None:
    ours, config = model(), json.loads((checkpoint / "adapter_config.json").read_text())
    load_adapter(ours, checkpoint, "a")
    surgery.deactivate(ours)
    load_adapter(ours, checkpoint, "b", config={**config, "revision": "other"})
    combine(ours, {"a": 0.5, "b": 0.5}, "both")
    assert fields(save_adapter(ours, tmp_path / "both", "both")) == {**KEPT, "revision": None}


def test_a_pickle_without_the_fields_can_be_saved(tmp_path: Path) -> None:
    ours = apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2))
    state = model_state(ours)
    assert state is not None
    del state.__dict__["peft_fields"]
    again = pickle.loads(pickle.dumps(ours))
    assert fields(save_adapter(again, tmp_path))["task_type"] is None


def distilbert() -> DistilBertForSequenceClassification:
    sizes: Any = {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=16, **sizes))


def test_a_head_that_peft_would_not_train_alone_is_told(tmp_path: Path) -> None:
    rules, task = [LoraRule(["q_lin", "v_lin"], rank=2), TrainRule("classifier")], {"task_type": "SEQ_CLS"}
    alone = apply_rules(distilbert(), rules)
    with pytest.raises(surgery.SurgeryError, match="would also train pre_classifier") as error:
        save_adapter(alone, tmp_path / "strict", format="peft", config=task)
    remedy = 'TrainRule(["pre_classifier", "classifier"])'
    assert remedy in str(error.value) and not (tmp_path / "strict").exists()
    with pytest.warns(surgery.SurgeryWarning, match="would also train pre_classifier"):
        ours = save_adapter(alone, tmp_path / "ours", config=task)
    assert json.loads((ours / "rules.json").read_text())["peft"] == task
    save_adapter(alone, tmp_path / "quiet")  # nothing of PEFT's was asked for

    both = apply_rules(distilbert(), [rules[0], eval(remedy, {"TrainRule": TrainRule})])
    peft.PeftModel.from_pretrained(distilbert(), str(save_adapter(both, tmp_path / "both", format="peft", config=task)))


def test_the_own_format_keeps_the_fields_for_a_save_in_the_format_of_peft(tmp_path: Path) -> None:
    ours = apply_rules(model(), LoraRule("query", rank=2))
    folder = save_adapter(ours, tmp_path / "ours", format="surgery", config={**KEPT, "r": 7})
    again = model()
    load_adapter(again, folder)
    assert fields(save_adapter(again, tmp_path / "peft", format="peft")) == KEPT
