"""PEFT's configurations of methods, with its names, fields and defaults, for `surgery.peft`: data alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from surgery.errors import RuleError, SurgeryWarning
from surgery.peft.base_config import PeftConfig
from surgery.peft.errors import as_builtin, invalid

__all__ = [
    "AdaLoraConfig",
    "BOFTConfig",
    "C3AConfig",
    "FourierFTConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "MissConfig",
    "OFTConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "TrainableTokensConfig",
    "VeraConfig",
]

Names = Any  # a list of names, or a text: a regular expression


@dataclass(kw_only=True)
class _Targeted(PeftConfig):
    target_modules: Names = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):  # as in PEFT
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))


@dataclass(kw_only=True)
class _Excluding(_Targeted):
    exclude_modules: Names = None


@dataclass(kw_only=True)
class _Layered(_Targeted):
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layers_need_names: ClassVar[bool] = True  # whether PEFT refuses layers beside a regular expression
    pattern_needs_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.layers_need_names:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise invalid(
                        f"`{name}` cannot be used when `target_modules` is a str.",
                        fix="name the modules in a list, or the layers in the regular expression",
                    )
        if self.layers_pattern and self.layers_to_transform is None and self.pattern_needs_layers:
            raise invalid(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. ",
                fix="layers_to_transform=[…]: the numbers of layers",
            )


@dataclass(kw_only=True)
class _Transposed(_Targeted):
    fan_in_fan_out: bool = False


@dataclass(kw_only=True)
class _Biased(_Targeted):
    bias: str = "none"


@dataclass(kw_only=True)
class _Started(_Targeted):
    init_weights: Any = True


# Fields of a LoraConfig with a configuration of their own → its class in PEFT.
_PARTS = {
    "velora_config": "VeloraConfig", "kasa_config": "KasaConfig", "eva_config": "EvaConfig",
    "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig", "arrow_config": "ArrowConfig",
    "use_bdlora": "BdLoraConfig",
}  # fmt: skip


@dataclass
class LoraRuntimeConfig:
    """PEFT's settings of a process, which are not saved. None of them changes anything here."""

    ephemeral_gpu_offload: bool = False


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
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    _custom_modules: ClassVar[None] = None  # which PEFT asks of a configuration

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, without the settings of a process."""
        return {name: value for name, value in super().to_dict().items() if name != "runtime_config"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_parts()
        if isinstance(self.target_parameters, str):
            raise as_builtin(RuleError("`target_parameters` must be a list of strings or None."), TypeError)
        if self.use_dora and self.megatron_config:
            raise invalid("DoRA does not support megatron_core, please set `use_dora=False`.")
        self._check_start()
        if self.lora_bias and self.init_lora_weights not in (True, False):
            what = "The argument lora_bias=True is only supported with init_lora_weights=True or False"
            raise invalid(f"{what}, got init_lora_weights={self.init_lora_weights} instead.")
        if self.lora_bias and self.use_dora:
            raise invalid("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            _warn("aLoRA is currently only supported for CAUSAL_LM task.")
        start = str(self.init_lora_weights)
        changes_base = start.startswith("pissa") or start in ("olora", "corda", "lora_ga")
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and changes_base:
            _warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                "base weights PiSSA/CorDA/OLoRA/LoRA-GA means that the base weights can't be restored by a conversion."
            )

    def _check_parts(self) -> None:
        """Each is None, plain data, or PEFT's object of its class."""
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict) and type(value).__name__ != kind:
                raise as_builtin(RuleError(f"`{kind}` must be a `{kind}`, a dict, or None.", where=name), TypeError)

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if start == "loftq":
            if not self.loftq_config:
                raise invalid("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = dict(vars(self.loftq_config))
        elif self.loftq_config:
            self.loftq_config = {}
            _warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        for name, written in (("eva", "EVA"), ("corda", "CorDA")):
            if start == name and getattr(self, f"{name}_config") is None:
                _warn(
                    f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. "
                    f"Using default {written} config."
                )
            if start != name and getattr(self, f"{name}_config") is not None:
                _warn(f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise invalid(f"{self.peft_type} does not support DoRA.")
        if self.init_lora_weights == "loftq":
            raise invalid(f"{self.peft_type} does not support LOFTQ.")
        if self.r != 8:
            _warn(
                "Note that `r` is not used in AdaLora and will be ignored. "
                "If you intended to set the initial rank, use `init_r` instead."
            )
        if self.total_step is None or self.total_step <= 0:
            raise invalid("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.orth_reg_weight < 0:
            raise invalid(
                "`orth_reg_weight` should be greater than or equal to 0, "
                f"but the value passed is {self.orth_reg_weight}"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise invalid(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or "
                "increase `total_step`."
            )


@dataclass(kw_only=True)
class IA3Config(_Excluding, _Transposed):
    """(IA)³: `IA3Rule`."""

    method = "IA3"
    feedforward_modules: Names = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fed, targets = self.feedforward_modules, self.target_modules
        if isinstance(fed, set) and isinstance(targets, set) and not fed <= targets:
            raise invalid("`feedforward_modules` should be a subset of `target_modules`")


@dataclass(kw_only=True)
class VeraConfig(_Layered, _Transposed, _Biased, _Started):
    """VeRA: `VeraRule`."""

    method = "VERA"
    layers_need_names = False
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1


@dataclass(kw_only=True)
class LoHaConfig(_Layered, _Excluding, _Started):
    """LoHa: `LohaRule`."""

    method = "LOHA"
    layers_need_names = False
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
    layers_need_names = False
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_one_of(self, "r", "oft_block_size")


@dataclass(kw_only=True)
class BOFTConfig(_Layered, _Excluding, _Transposed, _Biased, _Started):
    """BOFT: `BoftRule`."""

    method = "BOFT"
    layers_need_names = False
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_one_of(self, "boft_block_size", "boft_block_num")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("road_1", "road_2", "road_4"):
            raise invalid(f"Invalid variant {self.variant} specified. Please choose from road_1, road_2 or road_4")
        if self.group_size <= 0 or self.group_size % 2:
            what = "The group_size must be divisible by 2 when using RoadLayer"
            raise invalid(f"{what}, but got {self.group_size}.")


@dataclass(kw_only=True)
class RandLoraConfig(_Layered, _Transposed, _Biased, _Started):
    """RandLoRA: `RandLoraRule`."""

    method = "RANDLORA"
    layers_need_names = pattern_needs_layers = False
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

    @property
    def mask_fn(self) -> Any:
        """The function that draws the mask: the one that was set, or else PEFT's, for PEFT itself.

        A function of one's own is set after the configuration is made. It takes a module and r, and `random_seed` with
        mask_type="random". It returns a mask of the weight's shape with r · (out + in) ones.
        """
        own = vars(self).get("own_mask_fn")
        if own is not None or self.mask_type != "random":
            return own
        from peft.tuners.shira.mask_functions import random_mask

        return random_mask

    @mask_fn.setter
    def mask_fn(self, function: Any) -> None:
        vars(self)["own_mask_fn"] = function


@dataclass(kw_only=True)
class C3AConfig(_Layered, _Biased):
    """C3A: `C3aRule`."""

    method = "C3A"
    pattern_needs_layers = False
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
    pattern_needs_layers = False
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1


@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    """Rows of an embedding alone: `TokensRule`."""

    method = "TRAINABLE_TOKENS"
    token_indices: list[int] = field(default_factory=list)
    target_modules: Names = None
    init_weights: bool = True


def _check_one_of(config: Any, first: str, second: str) -> None:
    """Two fields of which one is 0 and the other is not."""
    one, two = getattr(config, first), getattr(config, second)
    if one == 0 == two:
        what = f"Either `{first}` or `{second}` must be non-zero"
        raise invalid(f"{what}. Currently, {first} = {one} and {second} = {two}.")
    if one != 0 != two:
        what = f"You can only specify either {first} ({one}) or {second} ({two}), but not both simultaneously"
        raise invalid(what, why="their product is the number of input features")


def _warn(text: str) -> None:
    warnings.warn(text, SurgeryWarning, stacklevel=4)
