"""The functions of PEFT's interface: `get_peft_model`, `inject_adapter_in_model`, and state dicts under PEFT's keys."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError, SurgeryWarning
from surgery.patterns.module_class import class_of
from surgery.patterns.wrappers import inner_of, unwrap
from surgery.peft import base_config
from surgery.peft.base_state import load_base_tensors
from surgery.peft.configuration import on_tensors
from surgery.peft.defaults import with_defaults
from surgery.peft.delegation import Facade, inside
from surgery.peft.errors import pefts_errors
from surgery.peft.model import LoadResult, PeftMixedModel, PeftModel
from surgery.peft.notices import warn_of_embeddings, warn_of_names
from surgery.peft.tensor_options import materialise
from surgery.peft_format.key_history import PREFIX
from surgery.peft_format.writing import from_peft, to_peft
from surgery.rewritten_model.state_dict import adapter_state_dict, load_adapter_state_dict
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.transaction.undo_log import Journal

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_peft_model_state_dict",
]

PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[base_config.PeftConfig]] = base_config.PeftConfig.kinds
"""`peft_type` → class of configuration."""


def get_peft_config(config_dict: Mapping[str, Any]) -> base_config.PeftConfig:
    """Return the configuration with these fields, of the method `peft_type`.

    >>> from surgery.peft import get_peft_config
    >>> get_peft_config({"peft_type": "LORA", "r": 16}).r
    16

    Raises:
        SurgeryError: there is no configuration of the method. It is also a KeyError.
        TypeError: the method does not have a field.
    """
    kind = str(getattr(config_dict["peft_type"], "value", config_dict["peft_type"]))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return base_config.PeftConfig.from_peft_type(peft_type=kind)  # which says what is wrong
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**config_dict)


def get_peft_model(
    model: nn.Module, peft_config: Any, adapter_name: str = "default", mixed: bool = False, **options: Any
) -> PeftModel:
    """Put an adapter on a model by PEFT's configuration, and return a façade before it.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]  # doctest: +NORMALIZE_WHITESPACE
    ['0.adapters.default.A', '0.adapters.default.B', '2.adapters.default.weight', '2.adapters.default.bias']

    Args:
        model: the model.
        peft_config: a configuration of this module or of PEFT.
        adapter_name: default "default".
        mixed: whether the façade is a `PeftMixedModel`; default False. Adapters of several methods go together in any
            façade.
        options: `example_inputs` as in `apply_rules`, which prefixes need on models that are not of transformers;
            `revision`; `autocast_adapter_dtype` and `low_cpu_mem_usage`, as in `PeftModel`.

    Returns:
        A PeftModel, or its subclass for the configuration's task type.

    Raises:
        SurgeryError: the configuration can't be held exactly, with the model unchanged. A `PlanError` lists several
            problems.
    """
    again = isinstance(inside(model), nn.Module) and bool(records_in(unwrap(inside(model))))
    named = getattr(peft_config, "base_model_name_or_path", None)
    kind = PeftMixedModel if mixed else PeftModel
    adapted = kind(model, peft_config, adapter_name, **options)
    config, revision = adapted.peft_config[adapter_name], options.get("revision")
    if again:
        text = "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
        warnings.warn(f"{text}different config, make sure to call `.unload()` before.", SurgeryWarning, stacklevel=2)
    warn_of_names(config, inside(model), adapter_name, named)
    if revision is not None and config.revision not in (None, revision):
        text = f"peft config has already set base model revision to {config.revision}, overwriting with revision"
        warnings.warn(f"{text} {revision}", SurgeryWarning, stacklevel=2)
    config.revision = revision or config.revision
    return adapted


def inject_adapter_in_model(
    peft_config: Any, model: nn.Module, adapter_name: str = "default", *, state_dict: Any = None, **options: Any
) -> Any:
    """Put an adapter on a model by PEFT's configuration, and return the model itself, without a façade.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, inject_adapter_in_model
    >>> base = nn.Sequential(nn.Linear(8, 8))
    >>> inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), base) is base
    True

    Args:
        peft_config: a configuration of this module or of PEFT.
        model: the model.
        adapter_name: default "default".
        state_dict: tensors under PEFT's keys; the adapter then goes on the modules that these are of, and not on the
            configuration's targets. Their values are not used. Default None.
        options: `low_cpu_mem_usage`, as in `get_peft_model`.

    Returns:
        The same model.

    Raises:
        SurgeryError: the configuration can't be held exactly, or is of virtual tokens, with the model unchanged.
    """
    with pefts_errors():
        base = inside(model)
        if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
            what = "`create_and_replace` does not support prompt learning and adaption prompt yet."
            raise SurgeryError(what, fix="call get_peft_model(model, config)")
        if state_dict is not None:
            peft_config = on_tensors(with_defaults(peft_config, base), base, state_dict)
        return PeftModel(base, peft_config, adapter_name, **options).get_base_model()


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's keys.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> list(get_peft_model_state_dict(model))
    ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']

    Args:
        model: a façade, or a model with the adapter.
        state_dict: the model's state dict, if its tensors were gathered elsewhere; default None.
        adapter_name: default "default".
        options: `save_embedding_layers`, as in `save_adapter`.

    Returns:
        PEFT's key → tensor. The keys of a model without a façade do not begin with `base_model.model.`, as in PEFT.

    Raises:
        SurgeryError: the adapter is unknown, or PEFT's format can't hold it.

    A model whose adapters transformers put there, by its own `add_adapter` or `load_adapter`, is one of PEFT's; PEFT
    itself then reads the tensors.
    """
    base = inside(model)
    save = options.get("save_embedding_layers", "auto")
    if vars(unwrap(base)).get("_hf_peft_config_loaded"):  # its adapters are PEFT's: transformers put them there
        theirs = import_module("peft").get_peft_model_state_dict
        return theirs(unwrap(base), state_dict, adapter_name, save_embedding_layers=save)
    if state_dict is None and class_of(model).__name__ == "FullyShardedDataParallel":
        state_dict = model.state_dict()  # which gathers the parts of all processes
    with pefts_errors(KeyError):
        adapter_names(rewritten(base)[1], adapter_name)
        original = _about_files(model, adapter_name)
        config, tensors = to_peft(base, adapter_name, False, state_dict, original, save)
        warn_of_embeddings(config, base, save)
        return dict(zip(_own_keys(model, tensors), tensors.values(), strict=True))


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **options: Any
) -> LoadResult:
    """Copy tensors under PEFT's keys into an adapter that is there: which were missing, and which are none of its.

    A tensor of the base that the adapter has no copy of goes into the base, as in PEFT: a bias, for example, that was
    trained with `bias="all"`. All or nothing: a tensor of another shape, or on the device meta, is an error, with the
    adapter and the base as they were. The adapter's tensors on the device meta that the state dict lacks stay there.

    `options`: `ignore_mismatched_sizes=True` passes over the adapter's tensors of another shape, with a warning; they
    are among the missing keys.
    """
    base, original = inside(model), _about_files(model, adapter_name)
    with pefts_errors(KeyError):
        adapter_names(rewritten(base)[1], adapter_name)
    if not _has_facade(model):
        named = {key: key if key.startswith("base_model.") else f"{PREFIX}{key}" for key in peft_model_state_dict}
        peft_model_state_dict = {named[key]: tensor for key, tensor in peft_model_state_dict.items()}
    if options.get("ignore_mismatched_sizes"):
        peft_model_state_dict = _without_other_sizes(base, adapter_name, peft_model_state_dict)
    with pefts_errors(RuntimeError), Journal():
        if on_meta := [key for key, tensor in peft_model_state_dict.items() if tensor.is_meta]:
            what, fix = f"{len(on_meta)} tensors of the state dict are on the device meta", "load their values first"
            raise SurgeryError(what, where=on_meta[0], why="they have no values", fix=fix)
        tensors, missing, unexpected = from_peft(base, adapter_name, peft_model_state_dict, original)
        came = [key for key, tensor in tensors.items() if not tensor.is_meta]
        materialise(base, adapter_name, came)
        own = adapter_state_dict(base, adapter_name)
        tensors = {key: own[key] if tensor.is_meta else tensor for key, tensor in tensors.items()}
        load_adapter_state_dict(base, tensors, adapter_name)
        loaded = load_base_tensors(base, {key: peft_model_state_dict[key] for key in unexpected})
    unexpected = [key for key in unexpected if key not in loaded]
    return LoadResult(_own_keys(model, missing), _own_keys(model, unexpected))


def _without_other_sizes(base: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict without those of another shape than the adapter's, with a warning of them."""
    own = {key: tuple(tensor.shape) for key, tensor in to_peft(base, adapter)[1].items()}
    other = [key for key, tensor in tensors.items() if own.get(key, tuple(tensor.shape)) != tuple(tensor.shape)]
    for key in other:
        text = f"{key} is {tuple(tensors[key].shape)}, and this adapter's is {own[key]}; it is ignored because of "
        warnings.warn(f"{text}ignore_mismatched_sizes=True", SurgeryWarning, stacklevel=3)
    return {key: tensor for key, tensor in tensors.items() if key not in other}


def _own_keys(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Keys of PEFT's file as PEFT has them for this model: a model without a façade has no prefix."""
    return list(keys) if _has_facade(model) else [key.removeprefix(PREFIX) for key in keys]


def _about_files(model: Any, adapter: str) -> dict[str, Any]:
    """The fields of an adapter's configuration that say what its state dict leaves out."""
    saved = getattr(getattr(model, "_configs", {}).get(adapter), "save_projection", None)
    return {} if saved is None else {"save_projection": saved}


def _has_facade(model: nn.Module) -> bool:
    layer: nn.Module | None = model
    while layer is not None and not issubclass(type(layer), Facade):
        layer = inner_of(layer)
    return layer is not None
