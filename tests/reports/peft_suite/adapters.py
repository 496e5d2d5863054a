"""The stand-in adapters, made by PEFT itself on the stand-in models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers

from tests.reports.peft_suite import hub
from tests.reports.peft_suite.models import HF, PEFT

OPT = PEFT + "tiny-random-OPTForCausalLM"
GPT2 = PEFT + "tiny-random-GPT2LMHeadModel"
T5 = PEFT + "tiny-random-T5ForConditionalGeneration"


@dataclass(frozen=True)
class Adapter:
    repository: str
    base: str
    model: str  # transformers' class
    task: str | None
    revision: str = "main"
    subfolder: str = ""
    targets: tuple[str, ...] | None = None  # PEFT's own for the architecture


BERT_LORA = PEFT + "tiny-random-BertModel-lora"
ADAPTERS = (
    Adapter(PEFT + "tiny-OPTForCausalLM-lora", OPT, "OPTForCausalLM", "CAUSAL_LM"),
    Adapter(PEFT + "tiny_OPTForSequenceClassification-lora", OPT, "OPTForSequenceClassification", "SEQ_CLS"),
    Adapter(PEFT + "tiny_OPTForQuestionAnswering-lora", OPT, "OPTForQuestionAnswering", "QUESTION_ANS"),
    Adapter(PEFT + "tiny_OPTForFeatureExtraction-lora", OPT, "OPTModel", "FEATURE_EXTRACTION"),
    Adapter(PEFT + "tiny_GPT2ForTokenClassification-lora", GPT2, "GPT2ForTokenClassification", "TOKEN_CLS"),
    Adapter(PEFT + "tiny_T5ForSeq2SeqLM-lora", T5, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    Adapter(
        PEFT + "tiny_WhisperForConditionalGeneration-lora", PEFT + "tiny-random-WhisperForConditionalGeneration",
        "WhisperForConditionalGeneration", None, targets=("q_proj", "v_proj"),
    ),
    Adapter(PEFT + "opt-125m-dummy-lora", PEFT + "opt-125m", "OPTForCausalLM", "CAUSAL_LM"),
    Adapter(PEFT + "gpt2-lora-random", "gpt2", "GPT2LMHeadModel", "CAUSAL_LM"),
    Adapter(BERT_LORA, HF + "tiny-random-BertModel", "BertLMHeadModel", "CAUSAL_LM"),
    Adapter(BERT_LORA, HF + "tiny-random-BertModel", "BertLMHeadModel", "CAUSAL_LM", revision="v1.2.3"),
    Adapter("ybelkada/test-st-lora", PEFT + "tiny-random-BertModel", "BertModel", "FEATURE_EXTRACTION"),
    Adapter(PEFT + "tiny-opt-lora-revision", OPT, "OPTForCausalLM", "CAUSAL_LM", revision="test"),
    Adapter(PEFT + "tiny-opt-lora-revision", OPT, "OPTForCausalLM", "CAUSAL_LM"),
    Adapter(PEFT + "test-lora-subfolder", OPT, "OPTForCausalLM", "CAUSAL_LM", subfolder="test"),
)  # fmt: skip


def build() -> list[str]:
    """Write all adapters; returns what could not be made."""
    missing = []
    for adapter in ADAPTERS:
        torch.manual_seed(1)
        try:
            model: Any = getattr(transformers, adapter.model).from_pretrained(adapter.base)
            options: dict[str, Any] = {
                "task_type": adapter.task,
                "init_lora_weights": False,
                "target_modules": adapter.targets,
            }
            adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
            folder = hub.place(adapter.repository, adapter.revision)
            adapted.save_pretrained(str(folder / adapter.subfolder))
            hub.tokenizer().save_pretrained(folder)
        except Exception as error:
            missing.append(f"{adapter.repository}: {type(error).__name__}: {error}")
    return missing
