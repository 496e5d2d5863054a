"""PEFT's configurations of prompts and prefixes, with its fields and defaults, for `surgery.peft`: data alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.peft.base_config import PeftConfig, PromptTuningInit
from surgery.peft.errors import invalid

__all__ = [
    "AdaptionPromptConfig",
    "MultitaskPromptTuningConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
]


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The fields that all configurations of virtual tokens have."""

    is_prompt_learning = True
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: `PrefixRule`."""

    method = "PREFIX_TUNING"
    init_weights: Any = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: `PromptRule`."""

    method = "PROMPT_TUNING"
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        by_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if by_text and not self.tokenizer_name_or_path:
            raise invalid(
                f"When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {self.tokenizer_name_or_path}."
            )
        if by_text and self.prompt_tuning_init_text is None:
            raise invalid("When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.")
        if self.tokenizer_kwargs and not by_text:
            raise invalid("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: `PromptRule` with an encoder."""

    method = "P_TUNING"
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning: `MultitaskPromptRule`."""

    method = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: `PrefixRule` with a gate."""

    method, is_adaption_prompt = "ADAPTION_PROMPT", True
    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None
