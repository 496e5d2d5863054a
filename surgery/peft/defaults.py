"""The targets that PEFT takes where a configuration names none: by method, and by the model's `model_type`.

From peft/utils/constants.py of PEFT 0.21 (Apache-2.0): the modules' names → the model types.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.patterns.module_walk import base_modules
from surgery.peft.base_config import PeftConfig, own_class
from surgery.peft.errors import as_builtin

__all__ = ["with_defaults"]

Table = Mapping[str, str]

_MOST: Table = {
    "q v": "t5 mt5",
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "q v q_proj v_proj": "blip-2",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
_ADALORA: Table = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox",
    "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "query value": "bert",
    "query key value dense": "roberta",
    "query_proj key_proj value_proj dense": "deberta-v2",
    "in_proj": "deberta",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
}
_IA3: Table = {
    "k v wo": "t5",
    "k v wi_1": "mt5",
    "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    "query_key_value mlp.dense_4h_to_h": "bloom",
    "key value output.dense": "roberta bert",
    "q_proj k_proj fc2": "opt",
    "q_proj v_proj fc_out": "gptj",
    "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
    "q_proj v_proj c_proj": "gpt_neo",
    "q_proj v_proj fc2": "bart phi",
    "k_proj v_proj down_proj": "llama mistral",
    "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "k_proj v_proj w2": "mixtral",
    "key_proj value_proj output.dense": "deberta-v2",
    "in_proj output.dense": "deberta",
}
_FED: Table = {  # IA3's feedforward_modules
    "wo": "t5",
    "": "mt5",
    "mlp.c_proj": "gpt2 gpt_bigcode",
    "mlp.dense_4h_to_h": "bloom",
    "output.dense": "roberta bert deberta-v2 deberta",
    "fc2": "opt bart phi",
    "fc_out": "gptj",
    "dense_4h_to_h": "gpt_neox RefinedWeb RefinedWebModel falcon",
    "c_proj": "gpt_neo",
    "down_proj": "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
    "w2": "mixtral",
}
_NORMS: Table = {
    "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
    "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
    "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    "layer_norm final_layer_norm": "t5 mt5",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "ln_1 ln_2 ln_f": "gpt2",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "ln_1 ln_f": "gptj",
    "input_layernorm final_layernorm": "phi",
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 "
    "gemma3_text",
    "post_attention_layernorm": "qwen2 qwen3",
}
_HEADS = {  # new ones, which PEFT trains by itself
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_OTHERS: Mapping[str, Table] = {"ADALORA": _ADALORA, "IA3": _IA3, "LN_TUNING": _NORMS}
_PROJECTIONS: Table = {"mlp.c_proj": "gpt2 gpt_bigcode"}
_DIFFERENT: Mapping[str, Table] = {  # from most methods'
    "FOURIERFT": _PROJECTIONS, "C3A": _PROJECTIONS, "VERA": {"q_proj v_proj": "phi"}, "SHIRA": {"q_proj v_proj": "phi"},
}  # fmt: skip


def with_defaults(config: Any, model: Any, task: str | None = None) -> PeftConfig:
    """A configuration, PEFT's own or one of ours, as a copy of ours with what PEFT fills in by itself: targets for this
    kind of model, heads that go with the task, and the base's name."""
    if not hasattr(config, "to_dict"):
        error = SurgeryError(f"{config!r} is not a configuration", fix="pass a LoraConfig, or another of its kind")
        raise as_builtin(error, TypeError)
    known = isinstance(config, PeftConfig) and own_class(type(config)).method is not None
    resolved: Any = copy.copy(config) if known else PeftConfig.from_dict(config.to_dict())
    function = getattr(config, "mask_fn", None)
    if not known and function is not getattr(resolved, "mask_fn", None):
        resolved.mask_fn = function
    heads = _HEADS.get(task or resolved.task_type, [])
    if heads and hasattr(resolved, "modules_to_save"):
        resolved.modules_to_save = list(dict.fromkeys([*(resolved.modules_to_save or []), *heads]))
    name = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    resolved.base_model_name_or_path = resolved.base_model_name_or_path or name or None
    if hasattr(resolved, "target_modules") and not resolved.is_adaption_prompt:
        _fill_targets(resolved, model)
    return resolved


def _fill_targets(config: Any, model: nn.Module) -> None:
    method, kind = str(config.method), _model_type(model)
    if method == "TRAINABLE_TOKENS":
        config.target_modules = config.target_modules or _embedding_path(model) or "embed_tokens"
        return
    if method == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = set(_looked_up(_FED, kind) or [])
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = _all_linear(model, config)
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        targets = _looked_up(_DIFFERENT.get(method, {}), kind) or _looked_up(_OTHERS.get(method, _MOST), kind)
        if targets is None:
            error = SurgeryError(
                "Please specify `target_modules` in `peft_config`",
                why=f"PEFT has no targets by default for {method} on {kind!r}",
                fix='target_modules=[…]: names of modules, or "all-linear"',
            )
            raise as_builtin(error)
        config.target_modules = targets[0] if "*" in targets[0] else set(targets)


def _all_linear(model: Any, config: PeftConfig) -> Any:
    """PEFT leaves a classifier out for SEQ_CLS alone; the engine's word leaves out every head."""
    modules = dict(base_modules(model))
    heads = [getattr(model, name, None) for name in ("score", "classifier", "qa_outputs")]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    inner = {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    attends = any(isinstance(module, nn.MultiheadAttention) for module in modules.values())
    if output is not None or not inner or config.task_type == "SEQ_CLS" or attends:
        return "all-linear"
    return {path for path, module in modules.items() if isinstance(module, nn.Linear) or _named(module, "Conv1D")}


def _embedding_path(model: Any) -> str | None:
    """The path of the model's input embeddings, as a regular expression; None where it does not tell them."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in base_modules(model) if module is embedding), None)


def _named(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def _looked_up(table: Table, kind: str) -> list[str] | None:
    return next((names.split() for names, kinds in table.items() if kind in kinds.split()), None)


def _model_type(model: Any) -> str:
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) else "custom"
