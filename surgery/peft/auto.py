"""A base and its adapter from one name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.peft.config import PeftConfig
from surgery.peft.model import PeftModel, placed

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]


class AutoPeftModel:
    """A base and its adapter from one name: the adapter's configuration tells the base.

    model = AutoPeftModelForCausalLM.from_pretrained("me/topics")
    """

    _target: str | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, adapter_name: str = "default", is_trainable: bool = False, config: Any = None,
        revision: str | None = None, **options: Any,
    ) -> PeftModel:  # fmt: skip
        where = {**placed(options), "revision": revision}
        found = config if config is not None else PeftConfig.from_pretrained(source, **where)
        if not found.base_model_name_or_path or cls._target is None:
            raise SurgeryError(
                "the adapter's configuration does not tell its base" if cls._target else f"{cls.__name__} has no task",
                fix="load the base yourself, and PeftModel.from_pretrained(base, …); or AutoPeftModelForCausalLM, …",
            )
        auto: Any = getattr(import_module("transformers"), cls._target)
        options = {name: value for name, value in options.items() if name != "subfolder"}
        base = auto.from_pretrained(found.base_model_name_or_path, revision=found.revision, **options)
        return PeftModel.from_pretrained(base, source, adapter_name, is_trainable, config, **where)


class AutoPeftModelForCausalLM(AutoPeftModel):
    _target = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    _target = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    _target = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    _target = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    _target = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    _target = "AutoModel"
