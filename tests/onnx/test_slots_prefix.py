"""Prefixes in an exported file's slots: any length at run time, none included, on attentions of every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery import SiteError, SurgeryError, apply_rules, using
from surgery.onnx.calls.example import ExampleCall, arrays_of, outputs_of
from surgery.rules import AdaptionRule, LoraRule, PrefixRule
from tests.support import tiny
from tests.support.longer_prefix import longer, moved
from tests.support.sampling import onnx_cases
from tests.support.slots import Exported, adapted, check_slots, outputs, plain, same
from tests.support.written_attention import WIDTH, Biased, Called, Flat, Plain


class First(nn.Module):
    """Attentions one after the other, of whose outputs only the first counts."""

    def __init__(self, *kinds: type[nn.Module]):
        super().__init__()
        self.inner = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            result = block(x)
            x = x + (result[0] if isinstance(result, tuple) else result)
        return x


@pytest.mark.parametrize("gate", onnx_cases([False, True], True))
def test_attention_that_is_written_out(gate: bool, tmp_path: Path) -> None:
    kinds = (Plain, Called) if gate else (Plain, Called, Flat, Biased)
    model, x = First(*kinds).eval(), {"x": torch.randn(5, 7, WIDTH)}
    base = plain(model)
    rules = {"a": PrefixRule(length=3, gate=gate), "b": PrefixRule(length=6, projection=4, gate=gate)}
    exported = Exported(adapted(model, rules, x), x, tmp_path)
    keys = {"key": [1], "value": [1], **({"gate": []} if gate else {})}
    assert {slot["tensor"]: slot["free"] for slot in exported.manifest["slots"]} == keys
    check_slots(exported, base, [{"x": torch.randn(3, 10, WIDTH)}, {"x": torch.randn(2, 1, WIDTH)}])
    other = apply_rules(plain(base), PrefixRule(length=3, gate=not gate), adapter="z", example_inputs=x)
    with pytest.raises(SiteError, match="slot differs in its gate"):
        exported.tensors("z", other)


def t5() -> tuple[nn.Module, dict[str, Any]]:
    """One layer: its attention has a bias of relative positions, and its decoder has a second attention."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids(4)}


def opt() -> tuple[nn.Module, dict[str, Any]]:
    """Its embedding of positions takes them by name, and adds a number to them."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32))
    return model, {"input_ids": tiny.ids(), "attention_mask": torch.ones_like(tiny.ids())}


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bert": (
        tiny.bert,
        {
            "a": PrefixRule(length=3, layers=0),
            "b": [PrefixRule(length=7, projection=5, layers=0), LoraRule(["value"], rank=2)],
            "gated": PrefixRule(length=2, gate=True, layers=1),
        },
    ),
    "gpt2": (tiny.gpt2, {"a": PrefixRule(length=3, shift="wpe"), "b": PrefixRule(length=4)}),
    "opt": (opt, {"a": PrefixRule(length=3, shift="embed_positions"), "b": PrefixRule(length=4)}),
    "t5": (t5, {"a": PrefixRule(length=3)}),
}


@pytest.mark.parametrize("name", onnx_cases(FAMILIES, "gpt2", "t5"))
def test_attention_that_takes_its_function_from_a_registry(name: str, tmp_path: Path) -> None:
    make, rules = FAMILIES[name]
    model, inputs = moved(make())
    base = plain(model)
    exported = Exported(adapted(model, rules, inputs), inputs, tmp_path)
    assert exported.report.notices == []
    check_slots(exported, base, [longer(inputs)])


@pytest.mark.slow("GPT-2 goes on from its cache after a prompt")
def test_a_decoder_that_goes_on_from_its_cache(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    model, inputs = moved(tiny.llama())
    model.config.use_cache = True  # type: ignore[union-attr]
    rules = {
        "a": PrefixRule(length=3),
        "b": PrefixRule(length=1),
        "prompts": AdaptionRule("self_attn", length=4, layers=1),
    }
    adapted(model, rules, {"input_ids": inputs["input_ids"]})

    def call(rows: int, length: int, past: int) -> dict[str, Any]:
        """Compare the next tokens of texts whose beginnings the live model read into the cache."""
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.randint(3, 99, (rows, past)), past_key_values=cache)
        mask = torch.ones(rows, past + length, dtype=torch.long)
        return {"input_ids": torch.randint(3, 99, (rows, length)), "attention_mask": mask, "past_key_values": cache}

    exported = Exported(model, call(3, 2, 5), tmp_path)
    for name in (None, *rules):
        tensors = {} if name is None else exported.tensors(name)
        fed = {key: tensor.numpy() for key, tensor in tensors.items()}
        for rows, length, past in ((3, 2, 5), (2, 1, 4)):
            with using(model, name), torch.no_grad():
                call_inputs = call(rows, length, past)
                arrays = arrays_of(ExampleCall.of(model, call_inputs), exported.manifest["inputs"])
                wanted = [tensor.numpy() for tensor in outputs_of(model(**call_inputs))]
            same([np.asarray(output) for output in exported.session.run(None, {**arrays, **fed})], wanted)


def test_one_key_of_zeros_is_no_empty_prefix(tmp_path: Path) -> None:
    x = {"x": torch.randn(5, 7, WIDTH)}
    model = adapted(First(Plain).eval(), {"a": PrefixRule(length=3)}, x)
    with pytest.raises(SurgeryError, match="empty='zeros1' leaves PrefixRule with an effect"):
        Exported(model, x, tmp_path, empty="zeros1")
    with using(model, None):
        before = outputs(model, x)
    same(outputs(model, x), before)
