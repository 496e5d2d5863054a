"""Small text models with virtual tokens, and the untouched model called by hand with them: for the tests of prompts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules, remove
from surgery.rules import PromptRule

transformers = pytest.importorskip("transformers")

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
N = 5
IDS = torch.tensor([[5, 3, 9, 2, 7, 11], [4, 8, 6, 2, 12, 3]])
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def mistral(**more: Any) -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, **more)
    )


def gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def opt(width: int = 24, **more: Any) -> Any:
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
        max_position_embeddings=64, word_embed_proj_dim=width, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    return transformers.MambaForCausalLM(config)


def bert_tokens() -> Any:
    return transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, num_labels=3))


def bert_sequences() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def roberta() -> Any:
    config = {**SMALL, "pad_token_id": 1, "bos_token_id": 0}
    return transformers.RobertaForTokenClassification(transformers.RobertaConfig(**config, num_labels=3))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.3, pad_token_id=0
    )
    return transformers.DistilBertForTokenClassification(config)


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True
    )
    return transformers.DebertaV2ForTokenClassification(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=20, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=0.5, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=20, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, init_std=0.3,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, scale_embedding=True,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


DECODERS: dict[str, Callable[..., Any]] = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "opt": opt}
ENCODERS: dict[str, Callable[..., Any]] = {
    "bert": bert_tokens, "roberta": roberta, "distilbert": distilbert, "deberta": deberta,
}  # fmt: skip

BOTH: dict[str, Callable[..., Any]] = {"t5": t5, "bart": bart}
TEXTS = {**DECODERS, **ENCODERS}


def host(model: nn.Module) -> Any:
    return next(module for module in model.modules() if "prompt" in getattr(box(module), "_parameters", {}))


def box(module: nn.Module, adapter: str = "default") -> Any:
    params = module._modules.get("adapters")
    return params._modules.get(adapter) if params is not None else None


def adapted(model: Any, **fields: Any) -> Any:
    return apply_rules(model.eval(), [PromptRule(length=N, **fields)])


def plain(model: Any) -> Any:
    return remove(copy.deepcopy(model))


def masks(side: str) -> dict[str, Any]:
    if side == "none":
        return {}
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    return {"attention_mask": mask.flip(1) if side == "right" else mask}


def by_hand(
    model: Any, ids: Tensor, attention_mask: Tensor | None = None, after: int = 0, behind: bool = False, **more: Any
) -> Any:
    """The untouched model, called with the prompt before (or among) its embeddings; not cut.

    `behind`: where the first row is padded on its left, its prompt stands behind that.
    """
    other = plain(model)
    prompt = box(host(model)).prompt.expand(len(ids), -1, -1)
    embeds = other.get_input_embeddings()(ids)
    if behind:
        assert attention_mask is not None and not after
        columns = ordered(attention_mask)
        more["attention_mask"] = torch.cat([attention_mask.new_ones(len(ids), N), attention_mask], 1).gather(1, columns)
        embeds = torch.cat([prompt, embeds], 1).gather(1, columns.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        with torch.no_grad():
            return other(inputs_embeds=embeds, **more)
    if attention_mask is not None:
        ones = attention_mask.new_ones(len(ids), N)
        more["attention_mask"] = torch.cat([attention_mask[:, :after], ones, attention_mask[:, after:]], 1)
    with torch.no_grad():
        return other(inputs_embeds=torch.cat([embeds[:, :after], prompt, embeds[:, after:]], 1), **more)


def ordered(mask: Tensor) -> Tensor:
    """Of columns of the prompt and the text, each row's padding on the left first, then the prompt."""
    rows = []
    for row in mask.tolist():
        padding = (row + [1]).index(1)
        rows.append([*range(N, N + padding), *range(N), *range(N + padding, N + len(row))])
    return torch.tensor(rows)


def text_of(output: Tensor, mask: Tensor) -> Tensor:
    """What a model returns for `ordered` columns, at the text's."""
    columns = ordered(mask).argsort(1)[:, N:]
    return output.gather(1, columns.unsqueeze(-1).expand(-1, -1, output.shape[-1]))


def logits(model: Any, *args: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **inputs).logits


def alike(actual: Tensor, expected: Tensor) -> None:
    """The head runs on the text's positions alone, by hand on all: a kernel for another shape rounds otherwise."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def in_peft(model: Any, kind: str, task: str, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="compares with PEFT")
        config = getattr(peft, kind)(task_type=task, num_virtual_tokens=N, **fields)
        peft_model = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for tensor in peft_model.prompt_encoder.parameters():
        nn.init.normal_(tensor)
    return peft_model


def take_over(theirs: Any, ours: Any) -> None:
    """Give our prompt PEFT's tensors."""
    actual = {
        name.replace("embedding.weight", "prompt").replace("_head.", "_").replace(".", "_"): tensor
        for name, tensor in theirs.prompt_encoder["default"].named_parameters()
    }
    actual = {
        {"prefix_task_cols": "columns", "prefix_task_rows": "rows"}.get(name, name): t for name, t in actual.items()
    }
    params = box(host(ours)).tensors()
    assert actual.keys() == params.keys()
    with torch.no_grad():
        for name, tensor in params.items():
            assert tensor.shape == actual[name].shape, name
            tensor.copy_(actual[name])
