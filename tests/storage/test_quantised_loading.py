"""Checkpoints of models whose quantised file was read into ordinary weights, as GGUF files without a kernel are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import SurgeryError, apply_rules, merge_to
from surgery.rules import LoraRule

transformers = pytest.importorskip("transformers")
quantiser = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="an older transformers")


def model_from_gguf() -> Any:
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    config = transformers.utils.quantization_config.GgufConfig("a.gguf")
    model.hf_quantizer = quantiser.GgufHfQuantizer(config)
    model.config.quantization_config = config
    return model


def test_unpacked_weights_are_written_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = apply_rules(model_from_gguf(), LoraRule("q_proj", rank=2, init="random"))
    ids, marks = torch.arange(8)[None], (model.hf_quantizer, model.config.quantization_config)
    merge_to(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    assert (model.hf_quantizer, model.config.quantization_config) == marks
    assert not hasattr(again.config, "quantization_config")


def test_packed_weights_are_refused_with_the_quantiser(tmp_path: Path) -> None:
    model = apply_rules(model_from_gguf(), LoraRule("q_proj", rank=2))
    packed = model.model.layers[0].mlp.up_proj
    packed.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SurgeryError, match="quantised by gguf") as error:
        merge_to(model, tmp_path / "merged")
    assert "up_proj" in str(error.value) and not (tmp_path / "merged").exists()
