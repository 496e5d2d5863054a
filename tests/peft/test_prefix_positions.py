"""Prefixes of the façade on models with learned positions: PEFT's outputs, to the bit, and PEFT's files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery.peft as ours
from tests.support.facade_models import moved
from tests.support.peers import peft


@torch.no_grad()
def call(model: Any, example: dict[str, Any]) -> torch.Tensor:
    output = model(**example)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification", "BertModel", "OPTForCausalLM"])
@pytest.mark.parametrize("padded", [slice(0, 0), slice(0, 3), slice(4, 7)], ids=["none", "left", "right"])
def test_a_prefix_shifts_learned_positions_as_pefts(name: str, padded: slice, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if "OPT" in name else {"intermediate_size": 48}
    kind: Any = getattr(transformers, name)
    base = kind(kind.config_class(**sizes, max_position_embeddings=64)).eval()
    task = "SEQ_CLS" if "Sequence" in name else "CAUSAL_LM" if "LM" in name else "FEATURE_EXTRACTION"
    fields: dict[str, Any] = {"task_type": task, "num_virtual_tokens": 4}
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**fields))).eval()
    model = ours.get_peft_model(copy.deepcopy(base), ours.PrefixTuningConfig(**fields)).eval()
    assert ours.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs)) == ([], [])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, padded] = 0
    example = {"input_ids": torch.randint(4, 60, (2, 7)), "attention_mask": mask}
    expected, rows = call(theirs, example), mask.bool() if task != "SEQ_CLS" else slice(None)
    assert torch.equal(call(model, example)[rows], expected[rows])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(call(again, example)[rows], expected[rows])


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", ["GPTJ", "CodeGen"])
def test_attentions_that_rotate_by_themselves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    base = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**fields))).eval()
    model = ours.get_peft_model(copy.deepcopy(base), ours.PrefixTuningConfig(**fields)).eval()
    assert ours.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs)) == ([], [])
    example = {"input_ids": torch.randint(4, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    expected = call(theirs, example)
    torch.testing.assert_close(call(model, example), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(call(again, example), expected, rtol=1e-5, atol=1e-6)
