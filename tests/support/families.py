"""Tiny models of transformers' families, one line each: random weights, and keyword inputs of one real call.

A family is a class of transformers and its configuration's fields. Nothing is imported until a model is made.
The sizes are the smallest that keep a family's own structure: two layers, four heads, groups where it has groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = (
    "encoder",
    "decoder",
    "encoder-decoder",
    "moe",
    "state-space",
    "vision",
    "audio",
    "multimodal",
    "time series",
    "other",
)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    name: str
    kind: str
    make: Callable[[], nn.Module]  # seeded by the caller
    inputs: Callable[[], Inputs]  # keyword inputs of one real call


FAMILIES: dict[str, Family] = {}


def _add(kind: str, name: str, cls: str, inputs: Callable[[], Inputs], *parts: dict[str, Any], **fields: Any) -> None:
    """`fields`, then `parts`, are the configuration's; dictionaries are nested configurations."""
    assert kind in KINDS and name not in FAMILIES, name
    settings: dict[str, Any] = {}
    for part in (*parts, fields):
        settings |= part

    def make() -> nn.Module:
        import transformers

        model = getattr(transformers, cls)
        return model(model.config_class(**settings))

    FAMILIES[name] = Family(name, kind, make, inputs)


# Example calls ----------------------------------------------------------------------------------------------------


def ids(length: int = 7) -> Tensor:
    return torch.randint(3, 99, (2, length))


def _text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def _whole_text() -> Inputs:
    return {"input_ids": ids(8)}


def _pair() -> Inputs:
    return {**_text(), "decoder_input_ids": ids(4)}


def _images(size: int = 16, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def _wave(length: int = 400) -> Callable[[], Inputs]:
    return lambda: {"input_values": torch.randn(2, length)}


def _text_and_images(size: int = 16) -> Callable[[], Inputs]:
    return lambda: {**_text(), **_images(size)()}


# fmt: off
# Fields that many configurations share ----------------------------------------------------------------------------

TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {**TOKENS, **SMALL, "max_position_embeddings": 32, "num_labels": 3}
LLAMA = {**TOKENS, **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32}
LLAMA_8 = {**LLAMA, "head_dim": 8}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48}
BART: dict[str, Any] = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}
VIT = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3}
SPEECH: dict[str, Any] = {
    **TOKENS, **SMALL, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "classifier_proj_size": 16,
}
SERIES: dict[str, Any] = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}


# Encoders ---------------------------------------------------------------------------------------------------------

_E = "encoder"
_add(_E, "bert", "BertForSequenceClassification", _text, BERT)
_add(_E, "roberta", "RobertaForSequenceClassification", _text, BERT)
_add(_E, "roberta_prelayernorm", "RobertaPreLayerNormForSequenceClassification", _text, BERT)
_add(_E, "xlm_roberta", "XLMRobertaForTokenClassification", _text, BERT)
_add(_E, "camembert", "CamembertForMaskedLM", _text, BERT)
_add(
    _E, "distilbert", "DistilBertForSequenceClassification", _text, TOKENS, dim=32, hidden_dim=48, n_layers=2,
    n_heads=4,
)
_add(_E, "albert", "AlbertForSequenceClassification", _text, BERT, embedding_size=16)
_add(_E, "electra", "ElectraForPreTraining", _text, BERT, embedding_size=16)
_add(
    _E, "deberta", "DebertaForSequenceClassification", _text, BERT, relative_attention=True,
    pos_att_type=["p2c", "c2p"],
)
_add(
    _E, "deberta_v2", "DebertaV2ForSequenceClassification", _text, BERT, relative_attention=True, position_buckets=8,
    pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
)
_add(_E, "mpnet", "MPNetForSequenceClassification", _text, BERT)
_add(_E, "modernbert", "ModernBertForMaskedLM", _text, BERT, cls_token_id=1, sep_token_id=2)
_add(_E, "xlnet", "XLNetForSequenceClassification", _text, TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=48)
_add(_E, "xlm", "XLMWithLMHeadModel", _text, TOKENS, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32)
_add(_E, "flaubert", "FlaubertModel", _text, TOKENS, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32)
_add(_E, "longformer", "LongformerForSequenceClassification", _text, BERT, attention_window=4)
_add(_E, "big_bird", "BigBirdForSequenceClassification", _text, BERT, attention_type="original_full")
_add(
    _E, "big_bird_sparse", "BigBirdModel", lambda: {"input_ids": ids(32)}, BERT, attention_type="block_sparse",
    block_size=2, num_random_blocks=1,
)
_add(_E, "fnet", "FNetForSequenceClassification", _whole_text, BERT)
_add(
    _E, "mobilebert", "MobileBertForSequenceClassification", _text, BERT, embedding_size=32, true_hidden_size=16,
    intra_bottleneck_size=16, num_feedforward_networks=2,
)
_add(_E, "squeezebert", "SqueezeBertForSequenceClassification", _text, BERT, embedding_size=32)
_add(
    _E, "funnel", "FunnelForTokenClassification", _text, TOKENS, block_sizes=[1, 1], num_decoder_layers=1, d_model=32,
    n_head=4, d_head=8, d_inner=48,
)
_add(_E, "nomic_bert", "NomicBertModel", _text, BERT, head_dim=8)
_add(
    _E, "convbert", "ConvBertForSequenceClassification", _text, BERT, embedding_size=32, head_ratio=2,
    conv_kernel_size=3,
)
_add(_E, "rembert", "RemBertForSequenceClassification", _text, BERT, input_embedding_size=16, output_embedding_size=24)
_add(_E, "roformer", "RoFormerForSequenceClassification", _text, BERT, embedding_size=32)
_add(_E, "megatron_bert", "MegatronBertForSequenceClassification", _text, BERT)
_add(
    _E, "nystromformer", "NystromformerForSequenceClassification", _whole_text, BERT, num_landmarks=4,
    segment_means_seq_len=8,
)
_add(_E, "yoso", "YosoForSequenceClassification", _text, BERT, use_expectation=True)
_add(_E, "ibert", "IBertForSequenceClassification", _text, BERT)
_add(_E, "mra", "MraModel", lambda: {"input_ids": ids(32)}, BERT)
_add(_E, "ernie", "ErnieForSequenceClassification", _text, BERT)
_add(_E, "eurobert", "EuroBertModel", _text, LLAMA)
_add(_E, "luke", "LukeModel", _text, BERT, entity_vocab_size=10, entity_emb_size=8)
_add(_E, "splinter", "SplinterModel", _text, BERT)
_add(
    _E, "xmod", "XmodModel", _text, BERT, languages=["en_XX", "de_DE"], default_language="en_XX",
    adapter_reduction_factor=2,
)
_add(_E, "esm", "EsmForTokenClassification", _text, BERT, mask_token_id=4, position_embedding_type="rotary")
_add(_E, "dpr", "DPRQuestionEncoder", _text, BERT, projection_dim=8)
_add(
    _E, "canine", "CanineModel", lambda: {"input_ids": ids(16)}, SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=32, num_hash_buckets=64, local_transformer_stride=8,
)

# Decoders ---------------------------------------------------------------------------------------------------------

_D = "decoder"
_add(_D, "gpt2", "GPT2LMHeadModel", _text, GPT)
_add(_D, "gpt_bigcode", "GPTBigCodeForCausalLM", _text, GPT)
_add(
    _D, "gpt_neo", "GPTNeoForCausalLM", _text, TOKENS, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=32,
)
_add(_D, "gptj", "GPTJForCausalLM", _text, GPT, rotary_dim=4)
_add(_D, "gpt_neox", "GPTNeoXForCausalLM", _text, BERT)
_add(_D, "gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", _text, BERT)
_add(
    _D, "opt", "OPTForCausalLM", _text, TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=32, word_embed_proj_dim=16,
)
_add(_D, "openai_gpt", "OpenAIGPTLMHeadModel", _text, GPT)
_add(_D, "ctrl", "CTRLLMHeadModel", _text, GPT, dff=48)
_add(_D, "bloom", "BloomForCausalLM", _text, TOKENS, hidden_size=32, n_layer=2, n_head=4)
_add(_D, "llama", "LlamaForCausalLM", _text, LLAMA)
_add(_D, "mistral", "MistralForCausalLM", _text, LLAMA_8, sliding_window=4)
_add(_D, "qwen2", "Qwen2ForCausalLM", _text, LLAMA)
_add(_D, "qwen3", "Qwen3ForCausalLM", _text, LLAMA_8)
_add(_D, "gemma", "GemmaForCausalLM", _text, LLAMA_8)
_add(_D, "gemma2", "Gemma2ForCausalLM", _text, LLAMA_8, query_pre_attn_scalar=8, sliding_window=4)
_add(_D, "gemma3", "Gemma3ForCausalLM", _text, LLAMA_8, query_pre_attn_scalar=8, sliding_window=4)
_add(_D, "phi", "PhiForCausalLM", _text, LLAMA, qk_layernorm=True)
_add(_D, "phi3", "Phi3ForCausalLM", _text, LLAMA)
_add(_D, "stablelm", "StableLmForCausalLM", _text, LLAMA)
_add(_D, "falcon", "FalconForCausalLM", _text, BERT, alibi=False)
_add(_D, "falcon_alibi", "FalconForCausalLM", _text, BERT, alibi=True, multi_query=False, parallel_attn=False)
_add(_D, "mpt", "MptForCausalLM", _text, vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=32)
_add(_D, "cohere", "CohereForCausalLM", _text, LLAMA, use_qk_norm=True)
_add(_D, "cohere2", "Cohere2ForCausalLM", _text, LLAMA_8, sliding_window=4)
_add(_D, "olmo", "OlmoForCausalLM", _text, LLAMA)
_add(_D, "olmo2", "Olmo2ForCausalLM", _text, LLAMA)
_add(_D, "olmo3", "Olmo3ForCausalLM", _text, LLAMA)
_add(_D, "smollm3", "SmolLM3ForCausalLM", _text, LLAMA)
_add(_D, "granite", "GraniteForCausalLM", _text, LLAMA)
_add(_D, "starcoder2", "Starcoder2ForCausalLM", _text, LLAMA)
_add(_D, "codegen", "CodeGenForCausalLM", _text, GPT, rotary_dim=4)
_add(_D, "persimmon", "PersimmonForCausalLM", _text, BERT)
_add(_D, "glm", "GlmForCausalLM", _text, LLAMA_8)
_add(_D, "glm4", "Glm4ForCausalLM", _text, LLAMA_8)
_add(_D, "nemotron", "NemotronForCausalLM", _text, LLAMA_8)
_add(_D, "helium", "HeliumForCausalLM", _text, LLAMA_8)
_add(_D, "diffllama", "DiffLlamaForCausalLM", _text, LLAMA_8)
_add(_D, "exaone4", "Exaone4ForCausalLM", _text, LLAMA_8)
_add(_D, "arcee", "ArceeForCausalLM", _text, LLAMA)
_add(_D, "biogpt", "BioGptForCausalLM", _text, BERT)
_add(
    _D, "xglm", "XGLMForCausalLM", _text, TOKENS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48,
    max_position_embeddings=32,
)
_add(_D, "lfm2", "Lfm2ForCausalLM", _text, LLAMA, layer_types=["conv", "full_attention"])
_add(_D, "bitnet", "BitNetForCausalLM", _text, LLAMA)
_add(_D, "seed_oss", "SeedOssForCausalLM", _text, LLAMA_8)
_add(_D, "apertus", "ApertusForCausalLM", _text, LLAMA)
_add(_D, "nanochat", "NanoChatForCausalLM", _text, LLAMA)
_add(
    _D, "minicpm3", "MiniCPM3ForCausalLM", _text, LLAMA, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)
_add(_D, "modernbert_decoder", "ModernBertDecoderForCausalLM", _text, BERT, cls_token_id=1, sep_token_id=2)

# Encoder-decoders -------------------------------------------------------------------------------------------------

_ED = "encoder-decoder"
_add(_ED, "t5", "T5ForConditionalGeneration", _pair, T5)
_add(_ED, "mt5", "MT5ForConditionalGeneration", _pair, T5, feed_forward_proj="gated-gelu")
_add(_ED, "umt5", "UMT5ForConditionalGeneration", _pair, T5)
_add(
    _ED, "longt5", "LongT5ForConditionalGeneration", _pair, T5, local_radius=4,
    encoder_attention_type="transient-global", global_block_size=4,
)
_add(_ED, "bart", "BartForConditionalGeneration", _pair, BART)
_add(_ED, "pegasus", "PegasusForConditionalGeneration", _pair, BART)
_add(_ED, "pegasus_x", "PegasusXForConditionalGeneration", _pair, BART, num_global_tokens=2, block_size=4)
_add(_ED, "bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", _pair, BART, attention_type="original_full")
_add(_ED, "marian", "MarianMTModel", _pair, BART)
_add(_ED, "mbart", "MBartForConditionalGeneration", _pair, BART)
_add(_ED, "mvp", "MvpForConditionalGeneration", _pair, BART)
_add(_ED, "plbart", "PLBartForConditionalGeneration", _pair, BART)
_add(
    _ED, "led", "LEDForConditionalGeneration", _pair, BART, attention_window=4, max_encoder_position_embeddings=32,
    max_decoder_position_embeddings=32,
)
_add(
    _ED, "prophetnet", "ProphetNetForConditionalGeneration", _pair, TOKENS, hidden_size=32, num_encoder_layers=2,
    num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=32, ngram=2, num_buckets=8, relative_max_distance=16,
    decoder_start_token_id=1,
)
_add(_ED, "blenderbot", "BlenderbotForConditionalGeneration", _pair, BART)
_add(_ED, "blenderbot_small", "BlenderbotSmallForConditionalGeneration", _pair, BART)
_add(_ED, "m2m_100", "M2M100ForConditionalGeneration", _pair, BART)
_add(_ED, "fsmt", "FSMTForConditionalGeneration", _pair, BART, src_vocab_size=99, tgt_vocab_size=99, langs=["en", "de"])

# Mixtures of experts ----------------------------------------------------------------------------------------------

_M = "moe"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    **LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}
_add(_M, "mixtral", "MixtralForCausalLM", _text, LLAMA, num_local_experts=4)
_add(_M, "qwen2_moe", "Qwen2MoeForCausalLM", _text, LLAMA, EXPERTS, shared_expert_intermediate_size=16)
_add(_M, "qwen3_moe", "Qwen3MoeForCausalLM", _text, LLAMA_8, EXPERTS)
_add(_M, "olmoe", "OlmoeForCausalLM", _text, LLAMA, num_experts=4, num_experts_per_tok=2)
_add(_M, "deepseek_v2", "DeepseekV2ForCausalLM", _text, DEEPSEEK, topk_method="greedy")
_add(_M, "deepseek_v3", "DeepseekV3ForCausalLM", _text, DEEPSEEK)
_add(_M, "gpt_oss", "GptOssForCausalLM", _text, LLAMA_8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
_add(_M, "granitemoe", "GraniteMoeForCausalLM", _text, LLAMA, num_local_experts=4)
_add(
    _M, "granitemoeshared", "GraniteMoeSharedForCausalLM", _text, LLAMA, num_local_experts=4,
    shared_intermediate_size=16,
)
_add(_M, "phimoe", "PhimoeForCausalLM", _text, LLAMA, num_local_experts=4)
_add(
    _M, "dbrx", "DbrxForCausalLM", _text, TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=32,
    ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
)
_add(_M, "jetmoe", "JetMoeForCausalLM", _text, LLAMA, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
_add(_M, "glm4_moe", "Glm4MoeForCausalLM", _text, DEEPSEEK, head_dim=8)
_add(
    _M, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _text, LLAMA, moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
    moe_layer_start_index=0,
)
_add(_M, "minimax", "MiniMaxForCausalLM", _text, LLAMA_8, num_local_experts=4, block_size=4)
_add(
    _M, "switch_transformers", "SwitchTransformersForConditionalGeneration", _pair, T5, num_experts=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2,
)
_add(
    _M, "nllb_moe", "NllbMoeForConditionalGeneration", _pair, BART, num_experts=4, encoder_sparse_step=2,
    decoder_sparse_step=2,
)

# State spaces and recurrences -------------------------------------------------------------------------------------

_S = "state-space"
MAMBA2 = {"head_dim": 8, "num_heads": 4, "n_groups": 2, "state_size": 4, "expand": 1, "chunk_size": 4}
_add(_S, "mamba", "MambaForCausalLM", _whole_text, TOKENS, hidden_size=16, state_size=4, num_hidden_layers=2)
_add(_S, "mamba2", "Mamba2ForCausalLM", _whole_text, TOKENS, MAMBA2, hidden_size=32, num_hidden_layers=2)
_add(
    _S, "falcon_mamba", "FalconMambaForCausalLM", _whole_text, TOKENS, hidden_size=16, state_size=4,
    num_hidden_layers=2,
)
_add(
    _S, "rwkv", "RwkvForCausalLM", _whole_text, TOKENS, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
    intermediate_size=48, context_length=32,
)
_add(
    _S, "recurrent_gemma", "RecurrentGemmaForCausalLM", _whole_text, LLAMA_8, num_hidden_layers=3, lru_width=32,
    attention_window_size=8,
)
_add(
    _S, "jamba", "JambaForCausalLM", _whole_text, LLAMA, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2,
    expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=4, mamba_dt_rank=2,
    use_mamba_kernels=False,
)
_add(
    _S, "zamba", "ZambaForCausalLM", _whole_text, LLAMA, num_hidden_layers=6, num_key_value_heads=4, mamba_d_state=4,
    mamba_dt_rank=2, n_mamba_heads=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
)
_add(
    _S, "zamba2", "Zamba2ForCausalLM", _whole_text, LLAMA, num_key_value_heads=4, mamba_d_state=4, mamba_expand=1,
    mamba_headdim=8, n_mamba_heads=4, mamba_ngroups=2, chunk_size=4, num_mem_blocks=1, use_mem_rope=True,
    hybrid_layer_ids=[1], layers_block_type=["mamba", "hybrid"], adapter_rank=4, use_mamba_kernels=False,
)
_add(
    _S, "bamba", "BambaForCausalLM", _whole_text, LLAMA, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8,
    mamba_expand=1, mamba_n_groups=2, mamba_d_state=4, mamba_chunk_size=4,
)
_add(
    _S, "falcon_h1", "FalconH1ForCausalLM", _whole_text, LLAMA_8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
    mamba_n_groups=2, mamba_d_state=4, mamba_chunk_size=4, mamba_expand=1,
)
_add(
    _S, "xlstm", "xLSTMForCausalLM", _whole_text, TOKENS, hidden_size=128, embedding_dim=128, num_heads=4, num_blocks=2,
    num_hidden_layers=2, chunk_size=4,
)
_add(
    _S, "qwen3_next", "Qwen3NextForCausalLM", _whole_text, LLAMA_8, EXPERTS, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16,
    layer_types=["linear_attention", "full_attention"],
)

# Vision -----------------------------------------------------------------------------------------------------------

_V = "vision"
STAGES: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": 3, "image_size": 32}
_add(_V, "vit", "ViTForImageClassification", _images(), VIT)
_add(_V, "deit", "DeiTForImageClassificationWithTeacher", _images(), VIT)
_add(_V, "beit", "BeitForImageClassification", _images(), VIT, use_relative_position_bias=True, out_indices=[0, 1])
_add(_V, "data2vec_vision", "Data2VecVisionForImageClassification", _images(), VIT, out_indices=[0, 1])
_add(
    _V, "swin", "SwinForImageClassification", _images(32), image_size=32, patch_size=2, embed_dim=8, depths=[1, 2],
    num_heads=[2, 4], window_size=4, num_labels=3,
)
_add(
    _V, "swinv2", "Swinv2ForImageClassification", _images(32), image_size=32, patch_size=2, embed_dim=8, depths=[1, 2],
    num_heads=[2, 4], window_size=4, num_labels=3,
)
_add(
    _V, "swin2sr", "Swin2SRForImageSuperResolution", _images(), image_size=16, embed_dim=12, depths=[2], num_heads=[2],
    window_size=4, upscale=2,
)
_add(_V, "convnext", "ConvNextForImageClassification", _images(32), STAGES, num_stages=2)
_add(_V, "convnextv2", "ConvNextV2ForImageClassification", _images(32), STAGES, num_stages=2)
_add(_V, "resnet", "ResNetForImageClassification", _images(32), STAGES, embedding_size=8)
_add(_V, "regnet", "RegNetForImageClassification", _images(32), STAGES, embedding_size=8, groups_width=4)
_add(_V, "bit", "BitForImageClassification", _images(32), STAGES, embedding_size=8, num_groups=2)
_add(
    _V, "focalnet", "FocalNetForImageClassification", _images(32), image_size=32, patch_size=2, embed_dim=8,
    hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], num_labels=3,
)
_add(
    _V, "mobilevit", "MobileViTForImageClassification", _images(32), image_size=32, patch_size=2, num_attention_heads=2,
    hidden_sizes=[8, 12, 16], neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 16], num_labels=3,
)
_add(
    _V, "mobilevitv2", "MobileViTV2ForImageClassification", _images(64), image_size=64, width_multiplier=0.1,
    num_labels=3,
)
_add(
    _V, "mobilenet_v1", "MobileNetV1ForImageClassification", _images(32), image_size=32, depth_multiplier=0.25,
    min_depth=4, num_labels=3,
)
_add(
    _V, "mobilenet_v2", "MobileNetV2ForImageClassification", _images(32), image_size=32, depth_multiplier=0.25,
    num_labels=3,
)
_add(
    _V, "efficientnet", "EfficientNetForImageClassification", _images(32), image_size=32, kernel_sizes=[3, 3],
    in_channels=[8, 8], out_channels=[8, 12], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2],
    depthwise_padding=[], width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, num_hidden_layers=2,
    num_labels=3,
)
_add(
    _V, "pvt", "PvtForImageClassification", _images(32), image_size=32, num_encoder_blocks=2, depths=[1, 1],
    sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2],
    num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=3,
)
_add(
    _V, "pvt_v2", "PvtV2ForImageClassification", _images(32), image_size=32, num_encoder_blocks=2, depths=[1, 1],
    sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
    mlp_ratios=[2, 2], num_labels=3,
)
_add(
    _V, "segformer", "SegformerForSemanticSegmentation", _images(32), num_encoder_blocks=2, depths=[1, 1],
    sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
    mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
)
_add(
    _V, "glpn", "GLPNForDepthEstimation", _images(64), num_encoder_blocks=4, depths=[1] * 4, sr_ratios=[4, 2, 1, 1],
    hidden_sizes=[8, 8, 16, 16], patch_sizes=[7, 3, 3, 3], strides=[4, 2, 2, 2], num_attention_heads=[1, 1, 2, 2],
    mlp_ratios=[2] * 4, decoder_hidden_size=8,
)
_add(_V, "dinov2", "Dinov2ForImageClassification", _images(), VIT)
_add(_V, "dinov2_with_registers", "Dinov2WithRegistersForImageClassification", _images(), VIT)
_add(_V, "dinov3_vit", "DINOv3ViTModel", _images(), VIT)
_add(
    _V, "dpt", "DPTForDepthEstimation", _images(32), VIT, image_size=32, num_hidden_layers=4, is_hybrid=False,
    backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 12, 16], fusion_hidden_size=8,
)
_add(
    _V, "vit_mae", "ViTMAEForPreTraining", lambda: {**_images()(), "noise": torch.rand(2, 4)}, VIT,
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=24,
)
_add(_V, "vit_msn", "ViTMSNForImageClassification", _images(), VIT)
_add(_V, "vitdet", "VitDetModel", _images(), VIT, pretrain_image_size=16, window_size=2, window_block_indices=[0])
_add(_V, "ijepa", "IJepaForImageClassification", _images(), VIT)
_add(
    _V, "levit", "LevitForImageClassification", _images(32), image_size=32, hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2],
    num_labels=3,
)
_add(
    _V, "poolformer", "PoolFormerForImageClassification", _images(32), depths=[1, 1], hidden_sizes=[8, 16],
    num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], mlp_ratio=2.0, num_labels=3,
)
_add(
    _V, "cvt", "CvtForImageClassification", _images(32), embed_dim=[8, 16, 24], num_heads=[1, 2, 2], depth=[1, 2, 3],
    num_labels=3,
)
_add(
    _V, "hiera", "HieraForImageClassification", _images(32), image_size=[32, 32], patch_size=[3, 3],
    patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2],
    masked_unit_size=[4, 4], query_stride=[2, 2], num_query_pool=2, decoder_hidden_size=8, decoder_depth=1,
    decoder_num_heads=1, num_labels=3,
)
_add(
    _V, "swiftformer", "SwiftFormerForImageClassification", _images(64), depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16],
    mlp_ratio=2, num_labels=3,
)
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
DETR: dict[str, Any] = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5, "num_labels": 3,
}
_add(_V, "detr", "DetrForObjectDetection", _images(32), DETR)
_add(_V, "conditional_detr", "ConditionalDetrForObjectDetection", _images(32), DETR)
_add(_V, "dab_detr", "DabDetrForObjectDetection", _images(32), DETR, hidden_size=32)
_add(_V, "table_transformer", "TableTransformerForObjectDetection", _images(32), DETR)
_add(
    _V, "deformable_detr", "DeformableDetrForObjectDetection", _images(32), DETR, num_feature_levels=2,
    encoder_n_points=2, decoder_n_points=2, disable_custom_kernels=True,
    backbone_config={**RESNET, "out_features": ["stage3", "stage4"]},
)
_add(_V, "yolos", "YolosForObjectDetection", _images(32), VIT, image_size=[32, 32], num_detection_tokens=3)
_add(
    _V, "sam_vision", "SamVisionModel", _images(16), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    mlp_dim=48, image_size=16, patch_size=4, output_channels=16, window_size=2, global_attn_indexes=[1],
)
_add(_V, "imagegpt", "ImageGPTForImageClassification", _whole_text, GPT, vocab_size=100, num_labels=3)
_add(
    _V, "videomae", "VideoMAEForVideoClassification", lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16)}, VIT,
    num_frames=4, tubelet_size=2,
)
_add(
    _V, "timesformer", "TimesformerForVideoClassification", lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16)}, VIT,
    num_frames=4,
)
_add(
    _V, "vivit", "VivitForVideoClassification", lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16)}, VIT,
    num_frames=4, tubelet_size=[2, 8, 8],
)
_add(
    _V, "upernet", "UperNetForSemanticSegmentation", _images(64), hidden_size=8, pool_scales=[1, 2],
    use_auxiliary_head=False, num_labels=3, backbone_config={"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]},
)
_add(_V, "vitpose_backbone", "VitPoseBackbone", _images(16), VIT, image_size=[16, 16], patch_size=[8, 8])

# Audio ------------------------------------------------------------------------------------------------------------

_A = "audio"
_add(
    _A, "whisper", "WhisperForConditionalGeneration",
    lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(4)}, BART, num_mel_bins=8,
    max_source_positions=20, max_target_positions=20,
)
_add(_A, "wav2vec2", "Wav2Vec2ForCTC", _wave(), SPEECH)
_add(
    _A, "wav2vec2_layer_norm", "Wav2Vec2ForSequenceClassification", _wave(), SPEECH, feat_extract_norm="layer",
    do_stable_layer_norm=True,
)
_add(_A, "hubert", "HubertForSequenceClassification", _wave(), SPEECH)
_add(_A, "wavlm", "WavLMForCTC", _wave(), SPEECH, num_buckets=8, max_bucket_distance=16)
_add(_A, "unispeech", "UniSpeechForCTC", _wave(), SPEECH)
_add(_A, "unispeech_sat", "UniSpeechSatForSequenceClassification", _wave(), SPEECH)
_add(_A, "sew", "SEWForCTC", _wave(), SPEECH, squeeze_factor=2)
_add(_A, "sew_d", "SEWDForCTC", _wave(), SPEECH, squeeze_factor=2, position_buckets=8)
_add(_A, "data2vec_audio", "Data2VecAudioForCTC", _wave(), SPEECH, num_conv_pos_embeddings=2, conv_pos_kernel_size=3)
_add(
    _A, "wav2vec2_conformer", "Wav2Vec2ConformerForCTC", _wave(), SPEECH, position_embeddings_type="relative",
    conv_depthwise_kernel_size=5,
)
_add(
    _A, "wav2vec2_bert", "Wav2Vec2BertForCTC", lambda: {"input_features": torch.randn(2, 12, 8)}, SPEECH,
    feature_projection_input_dim=8, conv_depthwise_kernel_size=5, output_hidden_size=32,
)
_add(
    _A, "audio_spectrogram_transformer", "ASTForAudioClassification", lambda: {"input_values": torch.randn(2, 24, 8)},
    SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=8, num_labels=3,
)
_add(
    _A, "speech_to_text", "Speech2TextForConditionalGeneration",
    lambda: {"input_features": torch.randn(2, 20, 8), "decoder_input_ids": ids(4)}, BART, input_feat_per_channel=8,
    conv_channels=16, num_conv_layers=2, conv_kernel_sizes=(3, 3), max_source_positions=32, max_target_positions=32,
)
_add(
    _A, "speecht5", "SpeechT5ForSpeechToText", lambda: {**_wave()(), "decoder_input_ids": ids(4)}, SPEECH, BART,
    encoder_layerdrop=0.0, max_speech_positions=128, max_text_positions=32, encoder_max_relative_position=8,
)
_add(
    _A, "moonshine", "MoonshineForConditionalGeneration",
    lambda: {"input_values": torch.randn(2, 2000), "decoder_input_ids": ids(4)}, LLAMA, encoder_num_hidden_layers=2,
    decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
    encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, num_key_value_heads=4, decoder_start_token_id=1,
)
_add(
    _A, "encodec", "EncodecModel", lambda: {"input_values": torch.randn(2, 1, 320)}, num_filters=4, hidden_size=8,
    num_residual_layers=1, upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=8, num_lstm_layers=1, kernel_size=3,
    last_kernel_size=3, target_bandwidths=[24.0], norm_type="time_group_norm",
)
_add(
    _A, "dac", "DacModel", lambda: {"input_values": torch.randn(2, 1, 320)}, encoder_hidden_size=4,
    decoder_hidden_size=16, downsampling_ratios=[2, 4], n_codebooks=2, codebook_size=16, codebook_dim=4,
)
_add(
    _A, "vits", "VitsModel", _whole_text, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    vocab_size=99, flow_size=32, spectrogram_bins=9, upsample_initial_channel=16, upsample_rates=[2, 2],
    upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
    prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
    duration_predictor_num_flows=2, noise_scale=0.0, noise_scale_duration=0.0,
)
_add(
    _A, "clap", "ClapModel",
    lambda: {**_text(), "input_features": torch.randn(2, 1, 64, 16), "is_longer": torch.tensor([[False], [False]])},
    text_config=BERT, projection_dim=16, audio_config={"spec_size": 32, "num_mel_bins": 16, "window_size": 4,
    "patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 8, "depths": [1, 1],
    "num_attention_heads": [2, 2], "hidden_size": 16, "num_hidden_layers": 2, "enable_fusion": False},
)

# Text with images, and more ---------------------------------------------------------------------------------------

_MM = "multimodal"
CLIP_TEXT: dict[str, Any] = {**TOKENS, **SMALL, "max_position_embeddings": 16, "projection_dim": 16}
CLIP_VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 16}
CLIP: dict[str, Any] = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}


def _with_regions() -> Inputs:
    return {**_text(), "visual_embeds": torch.randn(2, 3, 8), "visual_attention_mask": torch.ones(2, 3)}


def _with_image_tokens(token: int, count: int, size: int = 16) -> Callable[[], Inputs]:
    """Two texts, each with image tokens that the model replaces by its image's features."""

    def inputs() -> Inputs:
        marks = torch.full((2, count), token)
        return {"input_ids": torch.cat([marks, ids(4).clamp_max(90)], 1), **_images(size)()}

    return inputs


_add(_MM, "clip", "CLIPModel", _text_and_images(), CLIP)
_add(_MM, "siglip", "SiglipModel", _text_and_images(), text_config=CLIP_TEXT, vision_config=CLIP_VISION)
_add(_MM, "metaclip_2", "MetaClip2Model", _text_and_images(), CLIP)
_add(_MM, "chinese_clip", "ChineseCLIPModel", _text_and_images(), CLIP, text_config=BERT)
_add(_MM, "altclip", "AltCLIPModel", _text_and_images(), CLIP, text_config={**BERT, "project_dim": 16})
_add(
    _MM, "clipseg", "CLIPSegForImageSegmentation", _text_and_images(), CLIP, reduce_dim=16,
    decoder_num_attention_heads=2, decoder_intermediate_size=24, extract_layers=[0, 1], conditional_layer=0,
)
_add(
    _MM, "x_clip", "XCLIPModel", lambda: {**_text(), "pixel_values": torch.randn(2, 2, 3, 16, 16)}, CLIP,
    vision_config={**CLIP_VISION, "num_frames": 2, "mit_hidden_size": 16, "mit_intermediate_size": 24,
    "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}, prompt_layers=1, prompt_num_attention_heads=2,
)
_add(
    _MM, "groupvit", "GroupViTModel", _text_and_images(), CLIP, vision_config={**CLIP_VISION, "depths": [1, 1, 0],
    "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]}, projection_intermediate_dim=24,
)
_add(
    _MM, "blip", "BlipForConditionalGeneration", _text_and_images(), CLIP,
    text_config={**CLIP_TEXT, "encoder_hidden_size": 32},
)
_add(
    _MM, "align", "AlignModel", _text_and_images(32), text_config=BERT, projection_dim=8,
    vision_config={"image_size": 32, "kernel_sizes": [3, 3], "in_channels": [8, 8], "out_channels": [8, 12],
    "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [],
    "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 16, "num_hidden_layers": 2},
)
_add(_MM, "vilt", "ViltModel", _text_and_images(), BERT, image_size=16, patch_size=8, max_image_length=-1)
_add(
    _MM, "flava", "FlavaModel", _text_and_images(), text_config=BERT, image_config=VIT, multimodal_config=SMALL,
    image_codebook_config={"num_groups": 2}, projection_dim=16, hidden_size=32,
)
_add(
    _MM, "lxmert", "LxmertModel",
    lambda: {**_text(), "visual_feats": torch.randn(2, 3, 8), "visual_pos": torch.rand(2, 3, 4)}, BERT, l_layers=1,
    x_layers=1, r_layers=1, visual_feat_dim=8, num_hidden_layers={"vision": 1, "cross_encoder": 1, "language": 1},
)
_add(_MM, "visual_bert", "VisualBertModel", _with_regions, BERT, visual_embedding_dim=8)
_add(_MM, "git", "GitForCausalLM", _text_and_images(), BERT, vision_config=CLIP_VISION)
_add(
    _MM, "bridgetower", "BridgeTowerModel", lambda: {**_text_and_images()(), "pixel_mask": torch.ones(2, 16, 16)},
    SMALL, text_config=BERT,
    vision_config={**CLIP_VISION, "hidden_size": 64, "init_layernorm_from_vision_encoder": False},
)
_add(_MM, "owlvit", "OwlViTForObjectDetection", _text_and_images(), CLIP, projection_dim=32)
_add(_MM, "owlv2", "Owlv2ForObjectDetection", _text_and_images(), CLIP, projection_dim=32)
_add(
    _MM, "llava", "LlavaForConditionalGeneration", _with_image_tokens(98, 4),
    text_config={**LLAMA, "model_type": "llama"}, vision_config={**CLIP_VISION, "model_type": "clip_vision_model"},
    image_token_id=98, image_token_index=98,
)
# Its processor gives the types (1: what is to be written). Without them transformers takes all of the text to be seen
# by all of it where it can leave out the mask, and causally where it can't, as in a graph of any length.
_add(
    _MM, "paligemma", "PaliGemmaForConditionalGeneration",
    lambda: {**_with_image_tokens(98, 4)(), "token_type_ids": torch.tensor([[0] * 6 + [1] * 2] * 2)}, image_token_id=98,
    image_token_index=98, text_config={**LLAMA_8, "model_type": "gemma"}, projection_dim=32, hidden_size=32,
    vision_config={**CLIP_VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
)
_add(
    _MM, "trocr", "TrOCRForCausalLM", _whole_text, TOKENS, d_model=32, decoder_layers=2, decoder_attention_heads=4,
    decoder_ffn_dim=48, max_position_embeddings=32,
)
_add(
    _MM, "layoutlm", "LayoutLMForTokenClassification",
    lambda: {**_text(), "bbox": torch.randint(0, 50, (2, 7, 4)).sort(-1).values}, BERT, max_2d_position_embeddings=64,
)
_add(
    _MM, "layoutlmv3", "LayoutLMv3ForTokenClassification",
    lambda: {**_text_and_images()(), "bbox": torch.randint(0, 50, (2, 7, 4)).sort(-1).values}, BERT, coordinate_size=4,
    shape_size=8, input_size=16, patch_size=8, max_2d_position_embeddings=64, rel_pos_bins=8, rel_2d_pos_bins=8,
)
_add(
    _MM, "lilt", "LiltForTokenClassification",
    lambda: {**_text(), "bbox": torch.randint(0, 50, (2, 7, 4)).sort(-1).values}, BERT, hidden_size=24,
    channel_shrink_ratio=2, max_2d_position_embeddings=64,
)

# Time series ------------------------------------------------------------------------------------------------------

_T = "time series"


def _series(features: int = 1) -> Inputs:
    return {
        "past_values": torch.randn(2, 10), "past_time_features": torch.randn(2, 10, features),
        "past_observed_mask": torch.ones(2, 10), "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, features),
    }


def _channels() -> Inputs:
    return {"past_values": torch.randn(2, 16, 2)}


_add(_T, "time_series_transformer", "TimeSeriesTransformerForPrediction", _series, SERIES)
_add(_T, "informer", "InformerForPrediction", _series, SERIES)
_add(_T, "autoformer", "AutoformerForPrediction", _series, SERIES, label_length=2, moving_average=3)
_add(
    _T, "patchtst", "PatchTSTForPrediction", _channels, context_length=16, num_input_channels=2, patch_length=4,
    patch_stride=4, d_model=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, prediction_length=4, loss="mse",
)
_add(
    _T, "patchtsmixer", "PatchTSMixerForPrediction", _channels, context_length=16, num_input_channels=2, patch_length=4,
    patch_stride=4, d_model=16, num_layers=2, prediction_length=4, mode="mix_channel", loss="mse",
)
_add(
    _T, "timesfm", "TimesFmModelForPrediction",
    lambda: {"past_values": [torch.randn(16), torch.randn(16)], "freq": [0, 0]}, SMALL, patch_length=4,
    context_length=16, horizon_length=4, head_dim=8, freq_size=3,
)

# Others -----------------------------------------------------------------------------------------------------------

_O = "other"
_add(
    _O, "tapas", "TapasForQuestionAnswering",
    lambda: {**_text(), "token_type_ids": torch.zeros(2, 7, 7, dtype=torch.long)}, BERT,
    type_vocab_sizes=[3, 16, 16, 2, 2, 10, 10], max_num_columns=4, max_num_rows=8,
)
_add(
    _O, "markuplm", "MarkupLMModel", _text, BERT, max_depth=4, xpath_unit_hidden_size=4,
    max_xpath_tag_unit_embeddings=8, max_xpath_subs_unit_embeddings=8, tag_pad_id=7, subs_pad_id=7,
)
_add(
    _O, "perceiver", "PerceiverForMaskedLM", _text, d_model=16, d_latents=24, num_latents=4, num_blocks=1,
    num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=99,
    max_position_embeddings=7,
)
_add(
    _O, "decision_transformer", "DecisionTransformerModel", lambda: {"states": torch.randn(2, 3, 5),
    "actions": torch.randn(2, 3, 2), "rewards": torch.randn(2, 3, 1), "returns_to_go": torch.randn(2, 3, 1),
    "timesteps": torch.arange(3).repeat(2, 1), "attention_mask": torch.ones(2, 3)}, GPT, vocab_size=1, bos_token_id=0,
    eos_token_id=0, state_dim=5, act_dim=2, hidden_size=32, max_ep_len=16,
)
_add(
    _O, "reformer", "ReformerModel", lambda: {"input_ids": ids(16)}, TOKENS, hidden_size=32, attention_head_size=8,
    num_attention_heads=4, feed_forward_size=48, attn_layers=["local", "lsh"], axial_pos_shape=[4, 4],
    axial_pos_embds_dim=[16, 16], local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_buckets=2, num_hashes=1,
    max_position_embeddings=16, hash_seed=0, is_decoder=False,
)
