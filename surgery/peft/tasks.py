"""Façades by the model's task, and classes that load the base, too."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.peft.base_config import PeftConfig
from surgery.peft.model import PeftModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


class AutoPeftModel:
    """Loads a base and its adapter from one name: the adapter's configuration names the base.

    model = AutoPeftModelForCausalLM.from_pretrained("me/topics")
    """

    _target: str | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, adapter_name: str = "default", is_trainable: bool = False, **options: Any
    ) -> PeftModel:
        """`options` of the adapter as for `PeftModel.from_pretrained`; all others are transformers'."""
        own = {name: options.pop(name, None) for name in ("config", "subfolder", "revision", "example_inputs")}
        config = own["config"] or PeftConfig.from_pretrained(source, **own)
        if not config.base_model_name_or_path or cls._target is None:
            raise SurgeryError(
                "the adapter's configuration does not tell its base" if cls._target else f"{cls.__name__} has no task",
                fix="load the base yourself, and PeftModel.from_pretrained(base, …); or AutoPeftModelForCausalLM, …",
            )
        auto: Any = getattr(import_module("transformers"), cls._target)
        base = auto.from_pretrained(config.base_model_name_or_path, revision=config.revision, **options)
        return PeftModel.from_pretrained(base, source, adapter_name, is_trainable, **own)


def _kind(name: str, task: str, what: str) -> type[PeftModel]:
    names = {"__slots__": (), "_task": task, "_peft_class": name, "__doc__": f"A `PeftModel` {what}."}
    return type(name, (PeftModel,), names)


def _auto(name: str, target: str) -> type[AutoPeftModel]:
    return type(name, (AutoPeftModel,), {"_target": target, "__doc__": f"With transformers' `{target}`."})


_HEAD = "whose head, `classifier` or `score`, is trained, too"
PeftModelForCausalLM = _kind("PeftModelForCausalLM", "CAUSAL_LM", "of a causal language model")
PeftModelForFeatureExtraction = _kind("PeftModelForFeatureExtraction", "FEATURE_EXTRACTION", "of one without a head")
PeftModelForQuestionAnswering = _kind("PeftModelForQuestionAnswering", "QUESTION_ANS", "whose `qa_outputs` is trained")
PeftModelForSeq2SeqLM = _kind("PeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "of an encoder-decoder")
PeftModelForSequenceClassification = _kind("PeftModelForSequenceClassification", "SEQ_CLS", _HEAD)
PeftModelForTokenClassification = _kind("PeftModelForTokenClassification", "TOKEN_CLS", _HEAD)

AutoPeftModelForCausalLM = _auto("AutoPeftModelForCausalLM", "AutoModelForCausalLM")
AutoPeftModelForFeatureExtraction = _auto("AutoPeftModelForFeatureExtraction", "AutoModel")
AutoPeftModelForQuestionAnswering = _auto("AutoPeftModelForQuestionAnswering", "AutoModelForQuestionAnswering")
AutoPeftModelForSeq2SeqLM = _auto("AutoPeftModelForSeq2SeqLM", "AutoModelForSeq2SeqLM")
AutoPeftModelForSequenceClassification = _auto(
    "AutoPeftModelForSequenceClassification", "AutoModelForSequenceClassification"
)
AutoPeftModelForTokenClassification = _auto("AutoPeftModelForTokenClassification", "AutoModelForTokenClassification")
