"""The status of a model's adapters under PEFT's names: `get_layer_status` and `get_model_status`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.inspection.show import count_parameters
from surgery.patterns.module_class import class_of
from surgery.patterns.own_entries import own_parameter, parameter_names
from surgery.patterns.wrappers import unwrap
from surgery.peft.base_config import PeftConfig
from surgery.peft.delegation import Facade, inside
from surgery.peft.errors import as_builtin
from surgery.peft.merging import resting_adapters
from surgery.peft_format.methods import PeftMethod, part_of
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import Applied, ModelState, SiteState, sites

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Flag = bool | Literal["irregular"]
T = TypeVar("T")

# What the names of a method's layers begin with, beside the method's own name.
_CLASS_PREFIXES = {"ADALORA": "SVD", "C3A": "C3A", "FOURIERFT": "FourierFT", "HRA": "HRA", "MISS": "Miss"}
_BACKENDS = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit", "HQQLinear": "hqq"}


@dataclass
class TunerLayerStatus:
    """The status of one layer, with PEFT's fields."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The status of a model, with PEFT's fields."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Flag
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class _Layer:
    """One layer as PEFT counts them: its adapters, each with its tensors."""

    module: nn.Module
    site: SiteState
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def flags(self) -> dict[str, list[Flag]]:
        """Adapter → `requires_grad` of its parameters."""
        return {
            name: [tensor.requires_grad for tensor in tensors if isinstance(tensor, nn.Parameter)]
            for name, tensors in self.tensors.items()
        }


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """Return the status of each layer of PEFT's that a model's adapters correspond to.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_layer_status, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> [(layer.name, layer.module_type, layer.requires_grad) for layer in get_layer_status(model)]
    [('model.0', 'lora.Linear', {'default': True})]

    Args:
        model: a façade, or a model with adapters.

    Returns:
        A status for each site, in the order of the modules. Names begin with "model." for a façade, as in PEFT.

    Raises:
        SurgeryError: the model does not have an adapter (also a ValueError), or it only has virtual tokens or written
            attention (also a TypeError).
    """
    return _layer_status(model, "get_layer_status")


def get_model_status(model: Any) -> TunerModelStatus:
    """Return the status of a model's adapters as a whole; "irregular" where its layers differ.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_model_status, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> status = get_model_status(model)
    >>> status.adapter_model_type, status.peft_types, status.active_adapters
    ('LoraModel', {'default': 'LORA'}, ['default'])

    Args:
        model: a façade, or a model with adapters.

    Returns:
        A `TunerModelStatus`.

    Raises:
        SurgeryError: as for `get_layer_status`.
    """
    layers, base = _layer_status(model, "get_model_status"), inside(model)
    wrapped = issubclass(type(model), Facade)
    configs: dict[str, Any] = model._configs if wrapped else {}
    named = wrapped or any(cls.__name__ == "PreTrainedModel" for cls in type(base).__mro__)
    trainable, total = count_parameters(base)
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(({*layer.available_adapters} - {*layer.merged_adapters}) & merged for layer in layers)
    return TunerModelStatus(
        base_model_type=class_of(unwrap(base)).__name__ if named else "other",
        adapter_model_type=_tuner_of(next(iter(configs.values()), None)),
        peft_types={name: str(config.method) for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,  # an adapter is live as a whole, so layers do not differ
        active_adapters=layers[0].active_adapters,
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={
            name: _agreed(flags) for name, flags in _gathered(layer.requires_grad for layer in layers).items()
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({*sum(lists, [])}) for name, lists in _gathered(layer.devices for layer in layers).items()
        },
        quantization_backend=_backend_of(layers),
    )


def _layer_status(model: Any, called: str) -> list[TunerLayerStatus]:
    """The status of each layer; `called`: the function that an error names."""
    wrapped, base = issubclass(type(model), Facade), inside(model)
    configs: Mapping[str, Any] = model._configs if wrapped else {}
    if configs and all(config.is_prompt_learning or config.is_adaption_prompt for config in configs.values()):
        what = f"{called}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        raise as_builtin(SurgeryError(what, fix="surgery.summary(model) counts them, too"), TypeError)
    layers = dict(_layers(base)) if records_in(unwrap(base)) else {}
    if not layers:
        what = "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT "
        raise as_builtin(SurgeryError(f"{what}adapters injected in the model."))
    live = list(surgery.active(base))
    active = resting_adapters(base) or live or list(rewritten(base)[1].resting)
    return [
        TunerLayerStatus(
            name=f"model.{path}" if wrapped else path,
            module_type=kind,
            enabled=bool(live) or not active,
            active_adapters=list(active),
            merged_adapters=[name for name in _merged_at(layer.site) if name in layer.tensors],
            requires_grad={name: _agreed(flags) for name, flags in layer.flags.items() if flags},
            available_adapters=sorted(layer.tensors),
            devices={name: sorted({tensor.device.type for tensor in all_}) for name, all_ in layer.tensors.items()},
            quantization_backend=_backend(layer.module),
        )
        for (path, kind), layer in layers.items()
    ]


def targeted_modules(model: nn.Module) -> list[str]:
    """The paths of the modules that adapters have as targets, adapter by adapter."""
    return [path for path, stacks in _targeted(model) if not stacks]


def targeted_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that adapters have as targets, adapter by adapter."""
    return [f"{path}.{stack}" for path, stacks in _targeted(model) for stack in stacks]


def _targeted(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """The paths that adapters have as targets, each with the parameters of `target_parameters`."""
    if not records_in(unwrap(model)):
        return []
    root, state = rewritten(model)
    names: dict[str, dict[tuple[str, tuple[str, ...]], None]] = {name: {} for name in state.adapters}
    alone = _without_method(state)
    for path, module, site in sites(root):
        for applied in site.applied:
            part, tensors = part_of(applied.rule), tensors_of(module, applied.adapter)
            stacks = tuple(
                name for name in parameter_names(module) if f"{name}_A" in tensors and f"{name}_A" in applied.tensors
            )
            module_itself = _has_layers(part) or applied.adapter in alone
            if module_itself or (part is not None and part.layer == "ParamWrapper"):
                names[applied.adapter][path, () if module_itself else stacks] = None
    return list(dict.fromkeys(key for keys in names.values() for key in keys))


def _without_method(state: ModelState) -> set[str]:
    """The adapters whose rules are a method of PEFT's only where nothing is beside them, such as rows of tokens."""
    parts = {name: [part_of(rule) for rule in rules] for name, rules in state.adapters.items()}
    return {name for name, all_ in parts.items() if all(part is not None and part.alone for part in all_)}


def _has_layers(part: Any) -> bool:
    """Whether it is a method with layers of its own, which methods of virtual tokens do not have."""
    if not isinstance(part, PeftMethod):
        return False
    config = PeftConfig.kinds.get(str(part.peft_type), PeftConfig)
    return not config.is_prompt_learning and not config.is_adaption_prompt


def _layers(model: nn.Module) -> Iterator[tuple[tuple[str, str], _Layer]]:
    """Yields the layers by name and kind."""
    root, state = rewritten(model)
    alone = _without_method(state)
    for path, module, site in sites(root):
        layers: dict[tuple[str, str], _Layer] = {}
        for applied in site.applied:
            tensors = tensors_of(module, applied.adapter)
            own = {name: tensors[name] for name in applied.tensors if name in tensors}
            for key, names in _keys(path, module, applied, own, applied.adapter in alone):
                layer = layers.setdefault(key, _Layer(module, site))
                layer.tensors.setdefault(applied.adapter, []).extend(own[name] for name in names)
        yield from layers.items()


def _keys(
    path: str, module: nn.Module, applied: Applied, tensors: Mapping[str, Tensor], alone: bool
) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Yields the name and the kind of each layer that PEFT would make for a rule, with the names of its tensors."""
    part = part_of(applied.rule)
    if part is None:
        return
    method = str(part.peft_type).lower()
    if _has_layers(part):
        begin = "" if method == "ia3" else f"{method}."  # PEFT's layers of IA3 do not name it
        yield (path, begin + _class_name(method.upper(), module)), list(tensors)
    elif part.layer == "ParamWrapper":  # PEFT puts one around the module for each parameter, the first innermost
        stacks = [name for name in module._parameters if f"{name}_A" in tensors]
        for place, stack in enumerate(reversed(stacks)):
            inner = path + ".base_layer" * place
            yield (inner, f"{method}.ParamWrapper"), [name for name in tensors if name.startswith(f"{stack}_")]
    elif part.layer == "TrainableTokensLayer":
        yield (path if alone else f"{path}.token_adapter", part.layer), list(tensors)
    elif part.layer:
        yield (path, part.layer), list(tensors)


def _class_name(method: str, module: nn.Module) -> str:
    """What PEFT calls its layer of a method on a module."""
    if method == "LN_TUNING":
        return "LNTuningLayer"
    kind = class_of(module)
    names = [cls.__name__ for cls in kind.__mro__ if cls.__module__.startswith(("torch.nn.", "bitsandbytes."))]
    name = names[0] if names else kind.__name__
    name = {"NonDynamicallyQuantizableLinear": "Linear"}.get(name, name)
    return _CLASS_PREFIXES.get(method, "") + ("Linear" if kind.__name__ == "Conv1D" else name)


def _merged_at(site: SiteState) -> tuple[str, ...]:
    return site.merged.adapters if site.merged is not None else ()


def _backend(module: nn.Module) -> str | None:
    kinds = [cls.__name__ for cls in class_of(module).__mro__]
    weight = own_parameter(module, "weight")
    if any(cls.__module__.startswith("torchao.") for cls in type(weight).__mro__):
        return "torchao"
    return next((_BACKENDS[kind] for kind in kinds if kind in _BACKENDS), None)


def _backend_of(layers: Sequence[TunerLayerStatus]) -> str | None:
    backends = {layer.quantization_backend for layer in layers}
    return backends.pop() if len(backends) == 1 else "irregular"


def _agreed(flags: Sequence[Flag]) -> Flag:
    if all(flag is True for flag in flags):
        return True
    return "irregular" if any(flag is not False for flag in flags) else False


def _gathered(mappings: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """Adapter → its values in all mappings."""
    values: dict[str, list[T]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            values.setdefault(name, []).append(value)
    return values


def _tuner_of(config: Any) -> str:
    """The name of PEFT's tuner, such as LoraModel."""
    return "None" if config is None else f"{type(config).__name__.removesuffix('Config')}Model"
