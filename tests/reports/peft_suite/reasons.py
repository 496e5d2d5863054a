"""The rules of the classes: which failures have which class and reason. The first rule whose patterns all match counts.

A failure that no rule knows is of class (d): a difference that nobody has looked at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A class, the reason in words, and the patterns by which its failures are known.

    Keys of the patterns: `type` and `text` of the exception; `line`, the test's line that failed; `test`, its id;
    `expected`, the `pytest.raises` or `pytest.warns` around the line; `method`, the configuration's class. The words
    may quote the patterns' groups.
    """

    kind: str
    words: str
    patterns: dict[str, str]


# Attributes of PEFT's layers and tuners: a test that reads them looks at internals.
INTERNAL_ATTRIBUTE = (
    r"lora_\w+|base_layer|get_base_layer|scaling|r|ranknum|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|ia3_\w+|hra_\w+|vera_\w+|"
    r"randlora_\w+|road_\w+|miss_\w+|shira_\w+|c3a_\w+|fourierft_\w+|token_adapter|modules_to_save|original_module|"
    r"prompt_encoder|active_adapters?_layers|merged_adapters|ln_tuning_layers|_\w+|disable_adapters|adapter_layer_names|"
    r"trainable_tokens_\w+|word_embeddings|prompt_tokens|transformer_backbone_name|use_dora|lora_variant|lora_dropout|"
    r"get_delta_weight|set_scale|scale_layer|unscale_layer|parametrizations|prefix"
)
# Lines of tests that look at PEFT's layers, their parameters' names, or private functions.
INTERNAL_LINE = (
    r"\.(lora_[ABa-z]\w*|base_layer|ranknum|hada_\w+|lokr_\w+|oft_[rR]|boft_[RSP]|ia3_l|token_adapter|modules_to_save|"
    r"original_module|base_model\.model\.\w+|trainable_tokens_\w+|prompt_encoder)|ModulesToSaveWrapper|"
    r"TrainableTokensWrapper|BaseTunerLayer|LoraLayer|tuner_types|num_wrappers|wrappers\b"
)

REASONS: tuple[Reason, ...] = (
    Reason("a", "peft.{1}, for `{0}`", {"text": r"PEFT's (\w+)=.{0,3}<peft_facade\.(\w+)"}),
    Reason("a", "peft.{0}", {"text": r"__dataclass_fields__", "line": r"= (\w+Config)\."}),
    Reason("c", "`target_modules`: {0} on {1}", {"text": r"^(\w+)Rule can't go on this (\w+)"}),
    Reason("c", "PEFT's format: {0}", {"text": r"^PEFT's format can't hold ([^\n]*?)(?: \(.*)?\n"}),
)
