"""PEFT's configurations of methods, with its names, fields and defaults, for `surgery.peft`: data alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from surgery.peft.base_config import PeftConfig

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "C3AConfig",
    "FourierFTConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "VeraConfig",
]

Names = Any  # a list of names, or a text: a regular expression


@dataclass(kw_only=True)
class _Targeted(PeftConfig):
    target_modules: Names = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):  # as in PEFT
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))


@dataclass(kw_only=True)
class _Excluding(_Targeted):
    exclude_modules: Names = None


@dataclass(kw_only=True)
class _Layered(_Targeted):
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


@dataclass(kw_only=True)
class _Transposed(_Targeted):
    fan_in_fan_out: bool = False


@dataclass(kw_only=True)
class _Biased(_Targeted):
    bias: str = "none"


@dataclass(kw_only=True)
class _Started(_Targeted):
    init_weights: Any = True


@dataclass(kw_only=True)
class LoraConfig(_Layered, _Excluding, _Transposed, _Biased):
    """LoRA: `LoraRule`. Fields that no rule supports raise an error when the configuration is applied."""

    method = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: `AdaLoraRule`."""

    method = "ADALORA"
    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None


@dataclass(kw_only=True)
class IA3Config(_Excluding, _Transposed):
    """(IA)³: `IA3Rule`."""

    method = "IA3"
    feedforward_modules: Names = None
    init_ia3_weights: bool = True


@dataclass(kw_only=True)
class VeraConfig(_Layered, _Transposed, _Biased, _Started):
    """VeRA: `VeraRule`."""

    method = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1


@dataclass(kw_only=True)
class LoHaConfig(_Layered, _Excluding, _Started):
    """LoHa: `LohaRule`."""

    method = "LOHA"
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class LoKrConfig(LoHaConfig):
    """LoKr: `LokrRule`."""

    method = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False


@dataclass(kw_only=True)
class OFTConfig(_Layered, _Excluding, _Transposed, _Biased, _Started):
    """OFT: `OftRule`."""

    method = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5


@dataclass(kw_only=True)
class BOFTConfig(_Layered, _Excluding, _Transposed, _Biased, _Started):
    """BOFT: `BoftRule`."""

    method = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0


@dataclass(kw_only=True)
class HRAConfig(_Layered, _Excluding, _Biased, _Started):
    """HRA: `HraRule`."""

    method = "HRA"
    r: int = 8
    apply_GS: bool = False


@dataclass(kw_only=True)
class RoadConfig(_Started):
    """RoAd: `RoadRule`."""

    method = "ROAD"
    variant: str = "road_1"
    group_size: int = 64


@dataclass(kw_only=True)
class RandLoraConfig(_Layered, _Transposed, _Biased, _Started):
    """RandLoRA: `RandLoraRule`."""

    method = "RANDLORA"
    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640


@dataclass(kw_only=True)
class FourierFTConfig(_Layered, _Excluding, _Transposed, _Biased):
    """FourierFT: `FourierRule`."""

    method = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False


@dataclass(kw_only=True)
class ShiraConfig(_Transposed, _Started):
    """SHiRA: `ShiraRule`."""

    method = "SHIRA"
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None


@dataclass(kw_only=True)
class C3AConfig(_Layered, _Biased):
    """C3A: `C3aRule`."""

    method = "C3A"
    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: Any = "xavier_uniform"


@dataclass(kw_only=True)
class LNTuningConfig(_Excluding):
    """LN tuning: `NormRule`."""

    method = "LN_TUNING"


@dataclass(kw_only=True)
class MissConfig(_Layered, _Excluding, _Biased, _Started):
    """MiSS: `MissRule`."""

    method = "MISS"
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1


@dataclass(kw_only=True)
class _Virtual(PeftConfig):
    is_prompt_learning = True
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None


@dataclass(kw_only=True)
class PrefixTuningConfig(_Virtual):
    """Prefix tuning: `PrefixRule`."""

    method = "PREFIX_TUNING"
    init_weights: Any = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


@dataclass(kw_only=True)
class PromptTuningConfig(_Virtual):
    """Prompt tuning: `PromptRule`."""

    method = "PROMPT_TUNING"
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


@dataclass(kw_only=True)
class PromptEncoderConfig(_Virtual):
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
