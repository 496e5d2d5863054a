"""How MLX-LM names modules where its models have other names than transformers': mlx_lm/models/*.py."""

from __future__ import annotations

from surgery.storage.formats.module_names import register_module_names
from surgery.storage.formats.table import ModuleNames, NameRow

__all__ = ["MLX_NAMES"]

_WITH_IMAGES = (
    "gemma3", "kimi_k25", "kimi_vl", "lfm2_vl", "llama4", "llava", "minimax_m3_vl", "mistral3", "pixtral", "qwen2_vl",
    "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip

_NAMES = (
    ModuleNames(
        "mlx-language-model",
        (
            NameRow("language_model.model.{rest}", ("model.language_model.{rest}",)),
            NameRow("language_model.lm_head", ("lm_head",)),
        ),
        marks=(),  # reading finds modules of transformers 4 and 5 by itself
        own_marks=(r"model\.language_model\.",),
        model_types=_WITH_IMAGES,
    ),
    ModuleNames(
        "mlx-gpt2",
        (NameRow("model.{rest}", ("transformer.{rest}",)), NameRow("lm_head", ("lm_head",))),
        marks=(r"model\.(h\.\d+\.(attn|mlp)\.|wte|wpe)",),
        own_marks=(r"transformer\.(h\.\d+\.(attn|mlp)\.|wte|wpe)",),
        model_types=("gpt2", "gptj"),
    ),
    ModuleNames(
        "mlx-gpt-neox",
        (
            NameRow("model.h.{n}.{rest}", ("gpt_neox.layers.{n}.{rest}",)),
            NameRow("model.embed_in", ("gpt_neox.embed_in",)),
            NameRow("model.embed_out", ("lm_head",)),
        ),
        marks=(r"model\.(h\.\d+\.(attention\.|mlp\.dense)|embed_(in|out))",),
        own_marks=(r"gpt_neox\.",),
        model_types=("gpt_neox",),
    ),
    ModuleNames(
        "mlx-nemotron-h",
        (NameRow("backbone.{rest}", ("model.{rest}",)), NameRow("lm_head", ("lm_head",))),
        marks=(r"backbone\.layers\.\d+\.mixer\.",),
        own_marks=(r"model\.layers\.\d+\.mixer\.",),
        model_types=("nemotron_h",),
    ),
)
MLX_NAMES = tuple(register_module_names(names).name for names in _NAMES)
