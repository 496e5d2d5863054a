"""The rules of the classes: which failures have which class and reason. The first rule whose patterns all match counts.

A failure that no rule knows is of class (d): a difference that nobody has looked at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A class, the reason in words, and the patterns by which its failures are known.

    Keys of the patterns: `type` and `text` of the exception; `line`, the test's line that failed; `test`, its id;
    `expected`, the `pytest.raises` or `pytest.warns` around the line; `method`, the configuration's class; `fields`,
    the configuration's fields that the test sets; `causes`, the exceptions that the failure came from. The words may
    quote the patterns' groups.
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
    r"TrainableTokensWrapper|BaseTunerLayer|LoraLayer|tuner_types|num_wrappers|wrappers\b|"
    r"hasattr\([^\n]*\"(?:lora_[AB]|token_adapter)\""
)

_WORKS = (
    ("test_mha_with_separate_qkv_embed_raises", "LoRA on an attention with sizes of its own for keys and values"),
    ("test_mha_with_dora_raises", "DoRA on a MultiheadAttention"),
    ("test_error_raised_if_rank_not_divisible_by_groups", "a rank that a convolution's groups do not divide"),
    ("test_error_raised_for_conv2d_groups_greater_than_one", "HRA on a convolution with groups"),
    ("test_adding_multiple_adapters_with_different_target_parameters_raises", "adapters on parameters of their own"),
    (
        "test_multiple_configs_with_bias_raises|test_adding_multiple_adapters_with_bias_raises",
        "adapters with biases of their own",
    ),
    ("test_vera_mixing_save_projection_raises", "VeRA adapters with and without saved projections"),
    ("test_vera_add_second_adapter", "VeRA adapters with projections of their own"),
    ("test_unload_adapter", "`unload` of virtual tokens"),
    ("target_parameters.*test_weighted_combination", "`add_weighted_adapter` of adapters on parameters"),
    ("target_parameters.*mixed_adapter_batches", "`adapter_names` of adapters on parameters"),
    ("test_mixed_adapter_batches_training_mode_raises", "`adapter_names` in training"),
    ("test_mixed_adapter_batches_lora_with_dora_raises", "`adapter_names` with DoRA"),
    ("modules_to_save_merging_adapters", "`add_weighted_adapter` of adapters that train the same module"),
    ("test_set_requires_grad_prompt_learning_raises", "`set_requires_grad` of virtual tokens"),
    ("low_cpu_mem", "`low_cpu_mem_usage=True` with VeRA"),
    ("test_generate_pos_args", "`generate` of an encoder-decoder by position"),
    ("test_targeting_trainable_tokens_raises", "LoRA on an embedding with trained rows"),
    ("rejects_shared_state_tuners", "`inject_adapter_in_model` of VeRA"),
    (
        "test_(vera|randlora)\\.py.*test_multiple_adapters_different_prng_raises",
        "adapters with projections of their own",
    ),
    ("test_gradient_checkpointing_double_forward_raises", "several calls of an aLoRA before a backward pass"),
    ("test_num_beams_error", "beam search with aLoRA"),
    ("test_boft_conv2d_groups_greater_than_one_raises", "BOFT on a convolution with groups"),
)
# Models on which PEFT's prefix can't be held exactly, and why: see `why_not` of rules/_attention/rotary_keys.py.
_PREFIXES = (
    (r"T5|Bart", "of an encoder-decoder, which is in the decoder alone"),
    (r"Gemma3", "before windowed attention, where PEFT's prefix leaves the window as the text goes on"),
    (r"Deberta|Bloom", "on relative positions"),
)
_BASE_LAYER = r"'(?:Linear|Embedding|Conv[123]d|Conv1D|MultiheadAttention|LayerNorm|BatchNorm\dd)' object"

REASONS: tuple[Reason, ...] = (
    # Names that do not exist here.
    Reason("a", "peft.{1}, for `{0}`", {"text": r"PEFT's (\w+)=.{0,3}<peft_facade\.(\w+)"}),
    Reason("a", "peft.{0}", {"text": r"__dataclass_fields__", "line": r"= (\w+Config)\."}),
    Reason("a", "peft.{0}", {"text": r"^Object of type (\w+Config) is not JSON serializable"}),
    Reason("a", "peft.EvaConfig", {"test": r"TestEvaInitialization"}),
    Reason("a", "peft.KasaConfig", {"test": r"TestKasaInitialization"}),
    Reason("a", "peft.BdLoraConfig", {"test": r"test_bdlora_"}),
    Reason(
        "a",
        "`model.model` for the model: it is the model's own attribute",
        {"text": r"^'\w+' object has no attribute 'model'"},
    ),
    # PEFT's internals.
    Reason(
        "b", "`{0}` of PEFT", {"type": "AttributeError", "text": r"^'function' object", "line": r"(\w+)\.cache_clear"}
    ),
    Reason("b", "values that are put into PEFT's layers", {"test": r"test_miss_bat_approximate_conversion"}),
    Reason("b", "names of PEFT's parameters", {"line": r"assert devices_lora_weights =="}),
    Reason(
        "b",
        "names of PEFT's parameters",
        {"test": r"test_training_gradient_checkpointing\[\w+-Prompt", "line": r"assert param\.grad is None"},
    ),
    Reason("b", "names of PEFT's tensors in `state_dict()`", {"test": r"test_from_pretrained_missing_keys_warning"}),
    Reason("b", "names of PEFT's tensors in `state_dict()`", {"test": r"conversion.*targeted_modules_ident"}),
    Reason("b", "`peft_config` of the model inside", {"test": r"lora_conversion\.py.*test_model_without_peft_config"}),
    Reason("b", "the base's own biases in training: `bias` trains copies", {"test": r"test_lora_with_bias_argument"}),
    Reason("b", "adapters of PEFT's layers", {"line": r"assert available_adapters =="}),
    Reason("b", "attributes set on PEFT's layers", {"test": r"test_transient_attribute_access_non_existing_adapter"}),
    Reason(
        "b",
        "`set_adapter` of each of PEFT's layers",
        {"test": r"test_multiple_active_adapters_forward", "line": r"assert not torch\.allclose\(adapter_\d_output, c"},
    ),
    Reason(
        "b",
        "`set_adapter` of each of PEFT's layers: with the one adapter that is active here, PEFT's merge rounds by more",
        {
            "test": r"test_multiple_active_adapters_merge_and_unmerge\[RandLora Same",
            "line": r"assert torch\.allclose\(merged_combined_output",
        },
    ),
    Reason(
        "b",
        "the module `peft.config` is patched",
        {"test": r"test_peft_version_"},
    ),
    Reason(
        "b", "`{0}` of PEFT's layers", {"type": r"AttributeError", "text": _BASE_LAYER + r" has no attribute '(\w+)'"}
    ),
    Reason("b", "names of PEFT's tensors in `state_dict()`", {"type": r"KeyError", "text": r"^'base_model\.model\."}),
    Reason("b", "names of PEFT's parameters", {"text": r"base_model\.model\..* to require gradients, got"}),
    Reason(
        "b",
        "names of PEFT's parameters: copies of `modules_to_save` are among those of the adapter here",
        {
            "test": r"adapter_dtype_autocast\[\w+-True",
            "fields": r"\bmodules_to_save\b",
            "line": r"assert all\(p\.dtype == expected_dtype",
        },
    ),
    Reason("b", "attributes set on PEFT's layers", {"test": r"TestModelAndLayerStatus::\w+_(?:irregular|bnb)$"}),
    Reason("b", "the text of PEFT's layers", {"test": r"TestLayerRepr"}),
    Reason("b", "PEFT's containers of parameters are counted", {"line": r"assert num_default"}),
    Reason("b", "names inside PEFT's layers", {"test": r"(?:modules_to_save|token_indices)_targets_lora_layer_raises"}),
    Reason(
        "b",
        "base modules whose names begin as PEFT's tensors do",
        {"test": r"test_warning_naming_conflict", "type": r"AssertionError"},
    ),
    Reason(
        "b",
        "numbers of AdaLoRA's rank counters",
        {"test": r"test_get_nb_trainable_parameters", "line": r"params_adalora"},
    ),
    Reason("b", "`lora_E` of PEFT's layers", {"test": r"test_disable_adapters(?:_with_merging)?\[.*AdaLoraConfig"}),
    Reason("b", "names of PEFT's tensors in `state_dict()`", {"test": r"test_dora_save_and_load_remapping"}),
    Reason(
        "b", "PEFT's table of default targets is patched", {"test": r"test_default_target_modules_(?:list_of_)?str"}
    ),
    Reason("b", "arguments of PEFT's own forward and generation", {"test": r"prefix_tuning_offsets_position_ids_in_f"}),
    Reason("b", "arguments of PEFT's own forward and generation", {"test": r"prepare_inputs_for_generation_4d_atten"}),
    Reason("b", "a call of one of PEFT's layers", {"text": r"unexpected keyword argument 'adapter_names'"}),
    # Refused.
    Reason(
        "c",
        "`r`: more orthogonal vectors of {0} than a weight has room for",
        {"text": r"(\w+)Rule can't go on this .*orthogonal vectors can't be had of"},
    ),
    Reason("c", "`target_modules`: {0} on {1}", {"text": r"^(\w+)Rule can't go on this (\w+)"}),
    Reason("c", "`target_parameters`: a parametrized {0}", {"text": r"its (\w+) is parametrized"}),
    Reason(
        "c", "`target_modules`: {0} on a packed weight", {"text": r"^(\w+)Rule edits the weight of a \w+, which can't"}
    ),
    Reason("c", "merging {0} into a packed weight", {"text": r"^(\w+)Rule can't be merged here.*quantised"}),
    Reason("c", "`init_lora_weights`: a PiSSA or OLoRA that is not active", {"text": r"can't be idle.*at its start"}),
    Reason("c", "adapters that transformers put on the model", {"text": r"^this model has adapters of PEFT"}),
    Reason(
        "c",
        "`adapter_name`: another adapter has the name",
        {"causes": r"(?:there is an adapter|Adapter with name) '\w+' already"},
    ),
    Reason(
        "c",
        "merging OFT on a Conv2d: PEFT merges it to another function",
        {"text": r"^OftRule can't be merged\n[^\n]*\n  why:   it adds up patches"},
    ),
    Reason(
        "c",
        "two active adapters of {0} with the same tensors of the base",
        {"text": r"both (?:replace|have rows)", "method": r"^(\w+)Config$", "line": r"set_adapter\(\["},
    ),
    Reason("c", "PEFT's format: {0}", {"text": r"^PEFT's format can't hold ([^\n]*?)(?: \(.*)?\n"}),
    Reason("c", "`peft_type`: a prefix on a model without attention", {"text": r"^PrefixRule finds nothing to do"}),
    Reason("c", "`adapter_name`: another adapter has the name", {"text": r"^there is an adapter '\w+' already"}),
    *(
        Reason(
            "c",
            f"a prefix {words}: PEFT's format can't hold it, so it is saved in a format of its own",
            {
                "type": r"AssertionError",
                "method": r"PrefixTuningConfig",
                "test": model,
                "line": r"target_adapter_filename|\"adapter_model\.safetensors\" in os\.listdir",
            },
        )
        for model, words in _PREFIXES
    ),
    # Words.
    Reason(
        "e",
        "a warning that asks to untie the embeddings before a merge, which unties them here",
        {"test": r"test_warn_for_tied_embeddings_merge"},
    ),
    Reason(
        "e",
        "an error of torch about two dtypes, in the words of another operation",
        {"test": r"test_no_disable_input_dtype_casting", "text": r"must have the same dtype"},
    ),
    # PEFT refuses what works here.
    Reason("f", "`set_requires_grad` of virtual tokens", {"test": r"test_set_requires_grad_prompt_learning_raises"}),
    Reason(
        "f",
        "`convert_to_lora` of IA3 and of convolutions",
        {"text": r"^assert not True[\s\S]*supports_lora_conversion"},
    ),
    Reason(
        "f",
        "`convert_to_lora` of IA3: at the test's rank, the error is over the test's limit",
        {"test": r"test_lora_conversion\[IA3", "text": r"MSE too high"},
    ),
    *(Reason("f", words, {"test": test, "text": r"DID NOT RAISE"}) for test, words in _WORKS),
)
