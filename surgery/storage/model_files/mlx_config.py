"""A configuration of transformers with the fields that mlx-lm reads, by model type.

mlx-lm has classes of its own for the fields of each model. Those of most models read `rope_theta` and `rope_scaling`,
which transformers 5 writes inside of `rope_parameters`; without them, mlx-lm computes with values of its own.
Source: mlx-lm, models/*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["MlxModel", "check_mlx_config", "config_for_mlx"]

REMEDY = "merge_to(model, folder) writes a checkpoint, which mlx_lm.convert may read"
OTHER = "merge_to(model, folder) writes a checkpoint for other engines"
FULL, WINDOWS = "full_attention", "sliding_attention"
Config = Mapping[str, Any]


@dataclass(frozen=True)
class MlxModel:
    """What mlx-lm has for a model type.

    `model_class`: the class of transformers. `activations`: those that it computes. `unsaid`: fields with the values
    that it takes them to have. `scalings`: its kinds of rotary embeddings. `fields`: functions in this file for further
    fields of its configuration. `windows`: it computes windows of attention. `dropped_start`:
    the beginning of tensors' names that it does not have.
    """

    model_class: str
    activations: tuple[str, ...] = ("silu",)
    unsaid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")
    fields: tuple[Callable[[Config], dict[str, Any]], ...] = ()
    windows: bool = False
    dropped_start: str = ""


def _step(config: Config) -> int:
    """Of how many layers one has attention in full."""
    kinds = list(config.get("layer_types") or ())
    step = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if any((kind == FULL) != ((layer + 1) % step == 0) for layer, kind in enumerate(kinds)):
        why = "it takes attention in full to come every few layers, and layer_types says others"
        raise SurgeryError("mlx-lm would compute this model otherwise", why=why, fix=OTHER)
    return step


def _pattern(config: Config) -> dict[str, Any]:
    return {"sliding_window_pattern": _step(config)}


def _letters(config: Config) -> dict[str, Any]:
    if config.get("sliding_window") is None:
        return {"sliding_window_pattern": None}
    return {"sliding_window_pattern": "L" * (_step(config) - 1) + "G"}


def _local_theta(config: Config) -> dict[str, Any]:
    return {"rope_local_base_freq": config["rope_parameters"][WINDOWS]["rope_theta"]}


def _head_size(config: Config) -> dict[str, Any]:
    size = config.get("head_dim")
    return {"head_dim": size if size is not None else int(config["hidden_size"]) // int(config["num_attention_heads"])}


def _experts(config: Config) -> dict[str, Any]:
    return _head_size(config) | {"num_experts": config.get("num_experts", config.get("num_local_experts"))}


def _norms_of_apertus(config: Config) -> dict[str, Any]:
    return {"mlp_bias": bool(config.get("mlp_bias")), "post_norm": False, "qk_norm": True}


def _names_of_neox(config: Config) -> dict[str, Any]:
    full = _full(config)
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        why = "it takes intermediate_size to be four times hidden_size"
        raise SurgeryError("mlx-lm can't compute this model", why=why, fix=OTHER)
    return {"rotary_emb_base": full.get("rope_theta", 10000.0), "rotary_pct": full.get("partial_rotary_factor", 1.0)}


def _names_of_gpt_2(config: Config) -> dict[str, Any]:
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        why = "it takes n_inner to be four times n_embd"
        raise SurgeryError("mlx-lm can't compute this model", why=why, fix=OTHER)
    return {"n_ctx": config["n_positions"]}


_GELU = ("gelu_pytorch_tanh",)
_NO_WINDOWS = (("use_sliding_window", (False,)),)
_TIED = (("tie_word_embeddings", (True,)),)
_PLAIN_GPT_2 = (("scale_attn_weights", (True,)), ("scale_attn_by_inverse_layer_idx", (False,)))
_MODELS: dict[str, MlxModel] = {
    "llama": MlxModel("LlamaForCausalLM"),
    "mistral": MlxModel("MistralForCausalLM"),
    "qwen2": MlxModel("Qwen2ForCausalLM", unsaid=_NO_WINDOWS),
    "qwen3": MlxModel("Qwen3ForCausalLM", unsaid=(*_NO_WINDOWS, ("attention_bias", (False,)))),
    "granite": MlxModel("GraniteForCausalLM"),
    "smollm3": MlxModel("SmolLM3ForCausalLM", unsaid=_NO_WINDOWS),
    "gemma": MlxModel("GemmaForCausalLM", _GELU, _TIED, ()),
    "gemma2": MlxModel("Gemma2ForCausalLM", _GELU, _TIED, ()),
    "gemma3_text": MlxModel("Gemma3ForCausalLM", _GELU, _TIED, ("linear",), (_pattern, _local_theta), windows=True),
    "olmo2": MlxModel("Olmo2ForCausalLM"),
    "olmo3": MlxModel("Olmo3ForCausalLM", windows=True),
    "cohere": MlxModel("CohereForCausalLM", unsaid=_TIED, scalings=()),
    "cohere2": MlxModel("Cohere2ForCausalLM", unsaid=_TIED, scalings=(), fields=(_pattern,), windows=True),
    "stablelm": MlxModel("StableLmForCausalLM", scalings=()),
    "nemotron": MlxModel("NemotronForCausalLM", ("relu2",), scalings=("linear",)),
    "seed_oss": MlxModel("SeedOssForCausalLM"),
    "ernie4_5": MlxModel("Ernie4_5ForCausalLM", scalings=()),
    "exaone4": MlxModel("Exaone4ForCausalLM", fields=(_letters, _head_size), windows=True),
    "apertus": MlxModel("ApertusForCausalLM", ("xielu",), fields=(_norms_of_apertus,)),
    "helium": MlxModel("HeliumForCausalLM", scalings=()),
    "glm4": MlxModel("Glm4ForCausalLM", scalings=()),
    "phi3": MlxModel("Phi3ForCausalLM", scalings=()),
    "phi": MlxModel("PhiForCausalLM", ("gelu_new",), scalings=()),
    "starcoder2": MlxModel("Starcoder2ForCausalLM", _GELU, scalings=()),
    "gpt_neox": MlxModel("GPTNeoXForCausalLM", ("gelu",), scalings=(), fields=(_names_of_neox,)),
    "gpt2": MlxModel(
        "GPT2LMHeadModel", ("gelu_new",), (*_TIED, *_PLAIN_GPT_2), (), (_names_of_gpt_2,), dropped_start="transformer."
    ),
    "mixtral": MlxModel("MixtralForCausalLM", scalings=()),
    "qwen2_moe": MlxModel("Qwen2MoeForCausalLM", unsaid=_NO_WINDOWS, scalings=()),
    "qwen3_moe": MlxModel("Qwen3MoeForCausalLM", unsaid=_NO_WINDOWS, scalings=(), fields=(_experts,)),
}


def check_mlx_config(config: Config) -> MlxModel:
    """What mlx-lm has for a configuration. `SurgeryError` for a model that it would compute otherwise."""
    kind = str(config.get("model_type") or "")
    model = _MODELS.get(kind)
    if model is None:
        why = f"they are written for {', '.join(_MODELS)}"
        raise SurgeryError(f"no MLX folder is written for the model type {kind!r}", why=why, fix=REMEDY)
    classes = config.get("architectures") or [model.model_class]
    if classes != [model.model_class]:
        why = f"mlx-lm computes {model.model_class}, which has no other head"
        raise SurgeryError(f"no MLX folder is written for {', '.join(map(str, classes))}", why=why, fix=OTHER)
    for name, values in model.unsaid:
        if name in config and config[name] not in values:
            why = f"it takes it to be {' or '.join(map(repr, values))}"
            raise SurgeryError(f"mlx-lm can't compute {name}={config[name]!r}", why=why, fix=OTHER)
    activation = next((config[name] for name in _ACTIVATIONS if config.get(name)), None)
    if activation is not None and activation not in model.activations:
        why = f"it computes {' or '.join(model.activations)} for this model"
        raise SurgeryError(f"mlx-lm can't compute the activation {activation!r}", why=why, fix=OTHER)
    scaling = _kind(_full(config))
    if scaling != "default" and scaling not in model.scalings:
        why = f"it computes {', '.join(('default', *model.scalings))} for this model"
        raise SurgeryError(f"mlx-lm can't compute the rotary embeddings {scaling!r}", why=why, fix=OTHER)
    return model


_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")


def config_for_mlx(config: Config) -> dict[str, Any]:
    """All fields, with those of mlx-lm."""
    model = check_mlx_config(config)
    fields: dict[str, Any] = dict(config)
    full = _full(config)
    for name in ("rope_theta", "partial_rotary_factor"):
        if full.get(name) is not None:
            fields[name] = full[name]
    if "rope_parameters" in config or "rope_scaling" in config:
        kind = _kind(full)
        own = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
        fields["rope_scaling"] = {**own, "type": kind, "rope_type": kind} if kind != "default" else None
    for function in model.fields:
        fields |= function(config)
    return fields


def _full(config: Config) -> Mapping[str, Any]:
    """The parameters of rotary embeddings, of layers with attention in full."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return parameters.get(FULL, parameters)


def _kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")
