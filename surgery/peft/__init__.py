"""PEFT's names for code that can't be changed yet: `from surgery.peft import LoraConfig, get_peft_model, PeftModel`.

`get_peft_model` returns a façade: an object that stands before the model and passes everything on to it. The model
inside keeps its class and names, and the engine's verbs do the work. The tutorial "From PEFT in five minutes" tells how
to move to the engine.
"""

from __future__ import annotations

from surgery.peft import base_config, method_configs, prompt_configs, tasks
from surgery.peft.base_config import *  # noqa: F403
from surgery.peft.base_state import get_base_model_state_dict, set_base_model_state_dict
from surgery.peft.conversion import convert_to_lora, save_as_lora
from surgery.peft.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from surgery.peft.facade import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from surgery.peft.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from surgery.peft.kbit import prepare_model_for_kbit_training
from surgery.peft.loftq import replace_lora_weights_loftq
from surgery.peft.method_configs import *  # noqa: F403
from surgery.peft.model import PeftMixedModel, PeftModel
from surgery.peft.prompt_configs import *  # noqa: F403
from surgery.peft.prompt_modules import PromptEmbedding, PromptEncoder
from surgery.peft.status import get_layer_status, get_model_status
from surgery.peft.tasks import *  # noqa: F403
from surgery.short_help import list_names, shorten_help

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftWarning",
    "PromptEmbedding",
    "PromptEncoder",
    "convert_to_lora",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
__all__ += base_config.__all__
__all__ += method_configs.__all__
__all__ += prompt_configs.__all__
__all__ += tasks.__all__

list_names(globals())
shorten_help(globals())
