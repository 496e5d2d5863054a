"""Virtual tokens on every decoder of `families.py`: a row of a padded batch has the tokens and logits of the row alone.

A sample by default; all of them with ALL_FAMILIES=1 (`make families`). The virtual tokens are a text's embeddings:
the expected outputs are the untouched model's for that text followed by the row's text, without cache and padding.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules
from surgery.rules import PrefixRule, PromptRule
from tests.support.families import FAMILIES
from tests.support.prefix_families import NONE, OTHER

transformers: Any = pytest.importorskip("transformers")

# With a window that is shorter than a text where the family has windows.
SAMPLE = ["mistral", "gemma3", "gpt_oss", "qwen2", "bloom", "falcon_h1", "mamba"]
LATER = {
    "openai_gpt": "no cache", "rwkv": "looks at no mask", "xlstm": "takes no mask", "switch_transformers": "two parts",
    "nllb_moe": "two parts",
}  # fmt: skip
DECODERS = [
    name for name, family in FAMILIES.items() if family.kind in ("decoder", "moe", "state-space") and name not in LATER
]
NAMES = DECODERS if os.environ.get("ALL_FAMILIES") else SAMPLE
START, PADDING, NEW = [7, 3, 5, 11], 3, 6
SETTINGS: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip


def windowed(config: Any) -> Any:
    """The configuration with windows of four tokens, on every other layer where its layers can differ."""
    config = copy.deepcopy(config)
    if hasattr(config, "sliding_window"):
        config.sliding_window = 4
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = True
        if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
            config.layer_types = ["sliding_attention", "full_attention"]
    return config


def build(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = FAMILIES[name].make()
    model = type(model)(windowed(model.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # a tiny model's first weights let one token look like another
    return model


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(12, 90, (2, 9))
    ids[0, :PADDING] = 0
    return ids, (ids > 0).long()


def alone(model: Any, ids: Tensor, mask: Tensor, before: list[int]) -> tuple[Tensor, Tensor]:
    """Generate each row separately, without a cache; return the tokens and the logits."""
    actual = []
    for row, real in zip(ids, mask.bool(), strict=True):
        text = torch.tensor([[*before, *row[real].tolist()]])
        actual.append(model.generate(text, attention_mask=torch.ones_like(text), use_cache=False, **SETTINGS))
    return torch.cat([result.sequences[:, -NEW:] for result in actual]), torch.stack(
        [torch.cat([result.logits[step] for result in actual]) for step in range(NEW)]
    )


def same(actual: Any, tokens: Tensor, logits: Tensor) -> None:
    assert torch.equal(actual.sequences[:, -NEW:], tokens)
    # Recurrent layers go through a text by another kernel than through its tokens one by one.
    torch.testing.assert_close(torch.stack(actual.logits), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))


def ways(model: Any) -> dict[str, dict[str, Any]]:
    return {
        "no cache": {"use_cache": False},
        "cache": {"use_cache": True},
        "chunks": {"prefill_chunk_size": 4},
        "static": {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=30)},
    }


def generated(model: Any, ids: Tensor, mask: Tensor, more: dict[str, Any]) -> Any:
    return model.generate(ids, attention_mask=mask, **SETTINGS, **more)


def own_way(model: nn.Module, ids: Tensor, mask: Tensor, more: dict[str, Any], expected: Tensor) -> bool:
    """Whether the untouched model itself gives the same this way, for a padded batch."""
    try:
        actual = torch.stack(generated(model, ids, mask, more).logits)
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return False
    return torch.allclose(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    model = build(name)
    ids, mask = texts()
    tokens, logits = alone(model, ids, mask, START)
    bare = alone(model, ids, mask, [])[1]
    right = [way for way, more in ways(model).items() if own_way(model, ids, mask, more, bare)]
    assert {"no cache", "cache"} <= set(right)
    apply_rules(model, [PromptRule(length=len(START), init="text", text_ids=START, after=0)])
    for way in right:
        same(generated(model, ids, mask, ways(model)[way]), tokens, logits)


PREFIXED = (
    [name for name in DECODERS if name not in {*NONE, *OTHER}] if os.environ.get("ALL_FAMILIES") else ["gemma3", "mpt"]
)


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_sees_no_padding(name: str) -> None:
    model = build(name)
    ids, mask = texts()
    bare = alone(model, ids, mask, [])[1]
    right = [way for way, more in ways(model).items() if own_way(model, ids, mask, more, bare)]
    assert {"no cache", "cache"} <= set(right)
    apply_rules(model, [PrefixRule(length=3)], example_inputs={"input_ids": ids})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tokens, logits = alone(model, ids, mask, [])
    for way in right:
        same(generated(model, ids, mask, ways(model)[way]), tokens, logits)
