"""An object that stands before a model and hands everything on to it, and what `surgery.peft` asks of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.state import Applied, box_of, sites, tensors_of
from surgery.stored import tensor_key

__all__ = ["Facade", "LoadResult", "example_of", "half_precision", "numbers_in", "trained"]


class LoadResult(NamedTuple):
    """Keys that an adapter has and the tensors did not, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


_Seen: Any = nn.Module if TYPE_CHECKING else object  # what type checkers take it for, as isinstance does


class Facade(_Seen):
    """Passes for the model: `isinstance` holds, attributes are read from it and set on it, calls are its calls.

    It is no module of its own: what walks over modules walks over the model's, under the model's names.
    `_off`: the active adapters while none is live; `_trained`: names of each adapter's trained tensors.
    """

    __slots__ = ("__weakref__", "_base", "_configs", "_frozen", "_off", "_trained")

    _base: Any
    _configs: dict[str, Any]
    _frozen: dict[str, bool]
    _off: tuple[str, ...] | None
    _trained: dict[str, tuple[str, ...]]

    def _begin(self, model: nn.Module) -> None:
        base = Facade.inside(model)
        if not isinstance(base, nn.Module):
            raise SurgeryError(f"{type(base).__name__} is no model", fix="pass a torch.nn.Module")
        self._restore(base, {}, {}, None, {})

    def _restore(self, *held: Any) -> None:
        for name, value in zip(Facade.__slots__[1:], held, strict=True):
            object.__setattr__(self, name, value)

    @staticmethod
    def inside(model: Any) -> Any:
        """The model behind a façade, or the model itself."""
        return model._base if issubclass(type(model), Facade) else model

    @property
    def __class__(self) -> Any:  # what isinstance asks after type()
        return type(self._base)

    @property
    def __dict__(self) -> Any:
        return self._base.__dict__

    def __getattr__(self, name: str) -> Any:  # what is not found otherwise
        if name in Facade.__slots__:
            raise AttributeError(name)
        found = getattr(self._base, name)
        return _giving(self, found) if name in _THEMSELVES else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Facade.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._base, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self._base)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r})"

    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        with self._rows(adapter_names):
            return self._base(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        with self._rows(adapter_names):
            return self._base.generate(*args, **kwargs)

    def _rows(self, names: Any) -> AbstractContextManager[Any]:
        """Each row by an adapter of its own, where PEFT's adapter_names are given."""
        if names is None:
            return nullcontext()
        route: Any = import_module("surgery").route
        return route(self._base, [None if name == "__base__" else name for name in names])

    @property
    def base_model(self) -> Any:
        """PEFT's tuner: it has the façade's methods, and the model as its `model`."""
        return Tuner(self)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What the Trainer asks of quantised models: whether there is an adapter to train."""
        return bool(getattr(self._base, "is_quantized", False) and self._configs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _made(type(self), *copy.deepcopy(self._held(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made, (type(self), *self._held())

    def _held(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in Facade.__slots__[1:])


# Methods of modules that give the module back: of a façade they give the façade, for `model = model.to(device)`.
_THEMSELVES = frozenset(
    "apply bfloat16 cpu cuda double eval float half ipu mtia requires_grad_ share_memory to to_empty train type "
    "xpu".split()
)


def _giving(facade: Facade, method: Any) -> Any:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        return facade if found is facade._base else found

    return called


def _made(kind: type[Facade], *held: Any) -> Facade:
    made = object.__new__(kind)
    made._restore(*held)
    return made


class Tuner:
    """What PEFT has between its model and the model: `peft_model.base_model`."""

    def __init__(self, facade: Facade):
        self._facade = facade

    @property
    def model(self) -> Any:
        return self._facade._base

    def __getattr__(self, name: str) -> Any:
        if name == "_facade":
            raise AttributeError(name)
        return getattr(self._facade, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._facade(*args, **kwargs)


def trained(model: nn.Module, adapter: str) -> tuple[str, ...]:
    """The names in the model of an adapter's tensors that train, or will when it is live."""
    return tuple(
        tensor_key(path, f"{adapter}.{name}")
        for path, module, site in sites(model)
        for applied in site.applied
        if applied.adapter == adapter
        for name, tensor in tensors_of(module, adapter).items()
        if name in applied.tensors and (tensor.requires_grad or _rests(module, applied, name))
    )


def _rests(module: nn.Module, applied: Applied, name: str) -> bool:
    """Whether a tensor does not train because its adapter is idle."""
    box = box_of(module, applied.adapter)
    return not applied.live and box is not None and name in box._parameters and name not in box.still


def numbers_in(parameter: Any) -> int:
    """How many numbers a parameter stands for: more than it holds where they are packed, as PEFT counts."""
    count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # DeepSpeed keeps it elsewhere
    if type(parameter).__name__ == "Params4bit":
        count *= 2 * parameter.element_size()
    return count


def half_precision(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def example_of(model: Any, config: Any) -> Any:
    """An example call of a model of transformers, for methods that ask for one."""
    if config.method not in ("PREFIX_TUNING", "ADAPTION_PROMPT"):
        return None
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, dict):
        return None
    device = next(_devices(model), None)
    example = {name: tensor.to(device) for name, tensor in example.items() if isinstance(tensor, torch.Tensor)}
    if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in example:
        example.setdefault("decoder_input_ids", example["input_ids"])
    return example


def _devices(model: nn.Module) -> Iterator[torch.device]:
    return (parameter.device for parameter in model.parameters())
