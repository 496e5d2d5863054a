"""A façade is an instance of PEFT's classes, for libraries that ask, and of the model's own class."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import weakref
from abc import ABC
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from tests.support import ROOT
from tests.support.facade_models import bert, llama, out
from tests.support.peers import peft, transformers
from tests.support.words import words

TASKS = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}


class Plain(nn.Module):
    """A model whose class counts its subclasses."""

    subclasses: ClassVar[int] = 0

    def __init_subclass__(cls, *, required: Any, **kwargs: Any) -> None:
        Plain.subclasses += 1

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(base: Any, task: str | None = None, **options: Any) -> Any:
    return ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["layer"], task_type=task), **options)


@pytest.mark.parametrize("task", [None, *TASKS])
def test_a_facade_is_an_instance_of_pefts_class(task: str | None) -> None:
    model = adapted(Plain(), task)
    wanted = getattr(peft, TASKS[task] if task else "PeftModel")
    assert isinstance(model, peft.PeftModel) and isinstance(model, wanted)
    assert isinstance(model, (Plain, nn.Module)) and isinstance(model, Plain)
    others = [getattr(peft, name) for name in TASKS.values() if name != wanted.__name__]
    assert not isinstance(model, tuple(others)) and not isinstance(model, peft.PeftMixedModel)
    assert type(model).__name__ == wanted.__name__ and not isinstance(model, int)


def test_a_mixed_facade_is_pefts_mixed_model_and_no_other() -> None:
    """PEFT's mixed model is not a subclass of its PeftModel."""
    model = adapted(Plain(), mixed=True)
    assert isinstance(model, peft.PeftMixedModel) and not isinstance(model, peft.PeftModel)


def test_code_that_unwraps_pefts_models_ends_at_the_base() -> None:
    base = Plain()
    model = adapted(base)
    while isinstance(model, peft.PeftModel):
        model = model.base_model
    assert isinstance(model, Plain) and model.model is base
    trainer_utils: Any = pytest.importorskip("transformers.trainer_utils")
    assert trainer_utils.unwrap_peft_model(adapted(other := Plain())) is other


def test_the_reported_class_stands_for_the_models() -> None:
    """Its name, signature and attributes are the model's, and a call of it makes a plain model."""
    base, example = bert()
    kind = type(base)
    model: Any = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    reported: Any = model.__class__
    assert (reported.__name__, reported.__module__, reported.__doc__) == (kind.__name__, kind.__module__, kind.__doc__)
    assert repr(reported) == repr(kind) and reported.__mro__[:3][-1] is kind
    assert inspect.signature(reported.forward) == inspect.signature(kind.forward)
    assert inspect.getsource(reported) == inspect.getsource(kind)
    assert reported == kind == reported and {kind: 1}[reported] == 1
    assert reported not in (nn.Module, transformers.BertModel) and reported is not kind
    assert type(reported(base.config)) is kind and type(base) is kind and model.get_base_model() is base
    assert reported.config_class is kind.config_class
    assert model.__class__ is reported and issubclass(reported, (kind, peft.PeftModel))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert isinstance(copied, peft.PeftModelForSequenceClassification) and copied.__class__ is reported
        assert torch.equal(out(copied, example), out(model, example))
    plain = model.unload()
    assert plain is base and plain.__class__ is kind and not isinstance(plain, peft.PeftModel)


def test_the_hooks_of_the_models_class_do_not_run() -> None:
    before = Plain.subclasses
    assert isinstance(adapted(Plain()), peft.PeftModel) and Plain.subclasses == before


def test_a_metaclass_of_the_model_is_kept() -> None:
    class Abstract(nn.Sequential, ABC):
        pass

    model = ours.get_peft_model(Abstract(nn.Linear(4, 4)), ours.LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(model, peft.PeftModel) and isinstance(model, Abstract)


def test_a_wrapped_or_rewritten_root_is_still_seen() -> None:
    """The class of a root that is itself a site changes with its adapters."""
    compiled: Any = torch.compile(Plain(), backend="eager")
    model = ours.get_peft_model(compiled, ours.LoraConfig(r=2, target_modules=["layer"]))
    assert isinstance(model, peft.PeftModel) and isinstance(model, type(compiled))
    x = torch.randn(2, 4)
    assert torch.equal(model(x), compiled(x))


def test_reported_classes_are_freed_with_their_facades() -> None:
    model = adapted(Plain())
    reported = weakref.ref(model.__class__)
    gc.collect()
    assert reported() is model.__class__ is adapted(Plain()).__class__
    del model
    gc.collect()
    assert reported() is None and Plain.__subclasses__() == []


def test_a_facade_is_the_models_alone_under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's FSDP saves, of a model of PEFT's, what PEFT finds under its own names."""
    model = adapted(Plain())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert isinstance(model, Plain) and not isinstance(model, peft.PeftModel) and model.__class__ is Plain
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert isinstance(model, peft.PeftModel)


def test_peft_is_not_imported() -> None:
    code = """
import sys
from torch import nn
import surgery
from surgery.peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
assert isinstance(model, nn.Sequential) and isinstance(model, PeftModel) and model.__class__ is nn.Sequential
assert "peft" not in sys.modules
import peft
assert isinstance(model, peft.PeftModel) and isinstance(model, nn.Sequential)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


# transformers -------------------------------------------------------------------------------------------------------


def test_transformers_adds_and_loads_our_adapters(tmp_path: Any) -> None:
    """transformers' own `add_adapter` and `load_adapter` make PEFT's layers of a configuration or a folder of ours."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    outputs = []
    for library in (peft, ours):
        base, example = llama()
        torch.manual_seed(1)
        base.add_adapter(library.LoraConfig(**fields))
        outputs.append(out(base.eval(), example))
    assert torch.equal(*outputs)
    base, example = llama()
    expected = out(base, example)
    model: Any = ours.get_peft_model(base, ours.LoraConfig(**fields)).eval()
    assert not torch.equal(out(model, example), expected)
    model.save_pretrained(tmp_path)
    loaded, _ = llama()
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(out(loaded, example), out(model, example), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("task", ["text-classification", "text-generation", "feature-extraction"])
def test_a_pipeline_takes_a_facade(task: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its answers are those of the base with the adapter merged, and nothing is logged of an unsupported model."""
    kinds = {"text-classification": ("SEQ_CLS", bert), "text-generation": ("CAUSAL_LM", llama)}
    kind, family = kinds.get(task, ("FEATURE_EXTRACTION", lambda: (bert()[0].bert, None)))
    base = family()[0]
    targets = ["q_proj"] if task == "text-generation" else ["query"]
    config = ours.LoraConfig(r=2, target_modules=targets, task_type=kind, init_lora_weights=False)
    model: Any = ours.get_peft_model(base, config).eval()
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    try:
        pipe = transformers.pipeline(task, model=model, tokenizer=words(), device="cpu")
        answers = pipe(["w1 w2 w3", "w4"], **options)
        merged = copy.deepcopy(model).merge_and_unload()
        expected = transformers.pipeline(task, model=merged, tokenizer=words(), device="cpu")(
            ["w1 w2 w3", "w4"], **options
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text and pipe.model is model
    if task == "text-generation":
        assert answers == expected
    elif task == "text-classification":
        assert [a["label"] for a in answers] == [b["label"] for b in expected]
        assert [a["score"] for a in answers] == pytest.approx([b["score"] for b in expected], abs=1e-5)
    else:
        for a, b in zip(answers, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-4)
