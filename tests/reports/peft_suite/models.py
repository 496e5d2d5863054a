"""The stand-in models: tiny, with random weights, under the names by which PEFT's tests load models from a hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.reports.peft_suite import hub

t: Any = transformers  # its configurations take any of their fields by name
TOKENS = 1024
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
PEFT, TRL, HF = "peft-internal-testing/", "trl-internal-testing/", "hf-internal-testing/"


def decoder(config: Any, model: Any, **options: Any) -> Callable[[], Any]:
    """A decoder with two layers, four heads, and sizes of its own."""
    common = {
        "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, **SPECIAL,
    }  # fmt: skip
    return lambda: model(config(**{**common, **options}))


def opt(layers: int = 2, size: int = 16, tokens: int = TOKENS) -> Callable[[], Any]:
    sizes = {"hidden_size": size, "ffn_dim": 4 * size, "word_embed_proj_dim": size, "num_hidden_layers": layers}
    return decoder(t.OPTConfig, t.OPTForCausalLM, vocab_size=tokens, init_std=0.1, **sizes)


def llama(model: Any = t.LlamaForCausalLM, key_heads: int = 4) -> Callable[[], Any]:
    sizes = {"hidden_size": 16, "num_key_value_heads": key_heads, "max_position_embeddings": 256}
    return decoder(t.LlamaConfig, model, initializer_range=0.1, **sizes)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=TOKENS, initializer_range=0.1, **sizes, **SPECIAL))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=TOKENS, **sizes, **tokens))


def bart() -> Any:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    tokens = {"decoder_start_token_id": 1, "forced_eos_token_id": 1, **SPECIAL}
    config = t.BartConfig(vocab_size=TOKENS, d_model=16, max_position_embeddings=128, init_std=0.1, **sizes, **tokens)
    return t.BartForConditionalGeneration(config)


def whisper() -> Any:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    sizes |= {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 30}
    config = t.WhisperConfig(vocab_size=TOKENS, decoder_start_token_id=2, **sizes, **SPECIAL)
    return t.WhisperForConditionalGeneration(config)


def encoder(config: Any, model: Any, **options: Any) -> Callable[[], Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
    common = {"vocab_size": TOKENS, "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.1}
    return lambda: model(config(**{**common, **sizes, **options}))


def bert(model: Any = t.BertModel) -> Callable[[], Any]:
    return encoder(t.BertConfig, model)


def roberta(model: Any) -> Callable[[], Any]:
    return encoder(t.RobertaConfig, model, max_position_embeddings=514)


def experts(config: Any, model: Any, **options: Any) -> Callable[[], Any]:
    return decoder(config, model, num_key_value_heads=2, **options)


def llava() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = t.CLIPVisionConfig(image_size=30, patch_size=15, **sizes)
    text = llama()().config
    return t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


def resnet() -> Any:
    sizes = {"num_channels": 3, "embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
    return t.ResNetForImageClassification(t.ResNetConfig(num_labels=3, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    PEFT + "tiny-random-OPTForCausalLM": opt(),
    **dict.fromkeys([PEFT + "opt-125m", "facebook/opt-125m", "facebook/opt-350m"], opt(4, 32)),
    PEFT + "tiny-random-OPTForCausalLM-extended-vocab": opt(tokens=TOKENS + 2),
    **dict.fromkeys([f"{group}tiny-random-LlamaForCausalLM" for group in (PEFT, TRL, HF)], llama()),
    TRL + "tiny-LlamaForSequenceClassification-3.2": llama(t.LlamaForSequenceClassification, 2),
    **dict.fromkeys([PEFT + "tiny-random-gpt2", HF + "tiny-random-gpt2", "gpt2", "openai-community/gpt2"], gpt2),
    PEFT + "tiny-random-GPT2LMHeadModel": gpt2,
    PEFT + "tiny-random-BloomForCausalLM": decoder(t.BloomConfig, t.BloomForCausalLM, n_layer=2, n_head=4),
    PEFT + "tiny-random-GPTNeoXForCausalLM": decoder(t.GPTNeoXConfig, t.GPTNeoXForCausalLM),
    PEFT + "tiny-random-GPTJForCausalLM": decoder(t.GPTJConfig, t.GPTJForCausalLM, rotary_dim=4),
    HF + "tiny-random-MistralForCausalLM": experts(t.MistralConfig, t.MistralForCausalLM),
    TRL + "tiny-Qwen3ForCausalLM": experts(
        t.Qwen3Config, t.Qwen3ForCausalLM, hidden_size=16, head_dim=8, tie_word_embeddings=True
    ),
    TRL + "tiny-Qwen2ForCausalLM-2.5": experts(t.Qwen2Config, t.Qwen2ForCausalLM, hidden_size=16),
    PEFT + "tiny-dummy-qwen2": experts(t.Qwen2Config, t.Qwen2ForCausalLM, hidden_size=16),
    HF + "tiny-random-Gemma3ForCausalLM": experts(
        t.Gemma3TextConfig, t.Gemma3ForCausalLM, head_dim=8, sliding_window=16
    ),
    HF + "Mixtral-tiny": experts(t.MixtralConfig, t.MixtralForCausalLM, num_local_experts=4),
    TRL + "tiny-GptOssForCausalLM": experts(
        t.GptOssConfig, t.GptOssForCausalLM, intermediate_size=32, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=16,
    ),
    TRL + "tiny-Llama4ForCausalLM": experts(
        t.Llama4TextConfig, t.Llama4ForCausalLM, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32,
        head_dim=8, num_local_experts=4,
    ),
    **dict.fromkeys([TRL + "tiny-Qwen3MoeForCausalLM", HF + "tiny-qwen3-moe"], experts(
        t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM, hidden_size=16, intermediate_size=32, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, head_dim=8,
    )),
    **dict.fromkeys([PEFT + "tiny-random-BertModel", HF + "tiny-random-BertModel", "bert-base-uncased"], bert()),
    PEFT + "tiny-random-RobertaModel": roberta(t.RobertaModel),
    PEFT + "tiny-random-DebertaModel": encoder(
        t.DebertaConfig, t.DebertaModel, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    PEFT + "tiny-random-DebertaV2Model": encoder(t.DebertaV2Config, t.DebertaV2Model),
    PEFT + "tiny-random-BertForSequenceClassification": bert(t.BertForSequenceClassification),
    PEFT + "tiny-random-RobertaForSequenceClassification": roberta(t.RobertaForSequenceClassification),
    **dict.fromkeys([PEFT + "tiny-random-t5", "google/flan-t5-small", "google/flan-t5-base"], t5),
    **dict.fromkeys(["t5-base", "t5-small"], t5),
    PEFT + "tiny-random-T5ForConditionalGeneration": t5,
    PEFT + "tiny-random-T5ForConditionalGeneration-calibrated": t5,
    PEFT + "tiny-random-BartForConditionalGeneration": bart,
    PEFT + "tiny-random-WhisperForConditionalGeneration": whisper,
    PEFT + "tiny-random-ResNetForImageClassification": resnet,
    PEFT + "tiny-clip-text-2": encoder(t.CLIPTextConfig, t.CLIPTextModel, num_hidden_layers=5, **SPECIAL),
    **dict.fromkeys([PEFT + "tiny-LlavaForConditionalGeneration",
                     HF + "tiny-random-LlavaForConditionalGeneration"], llava),
    TRL + "tiny-NemotronHForCausalLM-nano": lambda: t.NemotronHForCausalLM(
        t.NemotronHConfig(vocab_size=TOKENS, hidden_size=32)
    ),
}  # fmt: skip


def pictures(size: int) -> Any:
    return t.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def llava_inputs() -> Any:
    """The processor of the stand-in for Llava: the token with its image_token_index stands for a picture."""
    tokenizer = hub.tokenizer(more=("<image>",))
    options = {"patch_size": 15, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaProcessor(pictures(30), tokenizer, **options)


# What makes inputs of pictures, saved beside a model.
PROCESSORS: dict[str, Callable[[], Any]] = {
    PEFT + "tiny-random-ResNetForImageClassification": lambda: pictures(224),
    PEFT + "tiny-LlavaForConditionalGeneration": llava_inputs,
}
# A model under a second revision, with other weights.
REVISIONS = {PEFT + "tiny-random-BertModel": "v2.0.0"}


def build() -> list[str]:
    """Write all models; returns what could not be made, for the installed transformers may lack a model."""
    missing = []
    for repository, make in MODELS.items():
        for seed, revision in enumerate(("main", REVISIONS.get(repository, ""))):
            if not revision:
                continue
            torch.manual_seed(seed)
            try:
                model = make().eval()
            except Exception as error:
                missing.append(f"{repository}: {type(error).__name__}: {error}")
                continue
            folder = hub.place(repository, revision)
            model.save_pretrained(folder)
            hub.tokenizer().save_pretrained(folder)
            if repository in PROCESSORS:
                PROCESSORS[repository]().save_pretrained(folder)
    return missing
