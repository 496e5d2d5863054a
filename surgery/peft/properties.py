"""What a façade says of its model and its adapters, under PEFT's names."""

from __future__ import annotations

from typing import Any, ClassVar

import surgery
from surgery.inspection.show import count_parameters
from surgery.lora_conversion.convertible_rules import is_convertible
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import unwrap
from surgery.peft.delegation import Facade, facade
from surgery.peft.merging import resting_adapters
from surgery.peft.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
    targeted_modules,
    targeted_parameters,
)
from surgery.state.records import model_state

__all__ = ["FacadeProperties"]


class FacadeProperties(Facade):
    """PEFT's properties of a model, and what it prints."""

    __slots__ = ()
    _tuner: ClassVar[Any]  # the class of `base_model`

    def get_base_model(self) -> Any:
        """Returns the model itself."""
        return self._base

    @property
    def base_model(self) -> Any:
        """PEFT's tuner: the façade's methods, and the model as `model`."""
        return facade(self._tuner, self._base, self._configs)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapter → configuration."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters. As in PEFT, they stay active while they are disabled or others are merged."""
        state = model_state(unwrap(self._base))
        if state is None:
            return []
        return resting_adapters(self._base) or list(surgery.active(self._base) or state.resting)

    @property
    def active_adapter(self) -> Any:
        """The active adapter's name; a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> Any:
        return self._configs.get(next(iter(self.active_adapters), ""))

    @property
    def peft_type(self) -> Any:
        return getattr(self.active_peft_config, "peft_type", None)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Tells the Trainer whether a quantised model has an adapter to train."""
        return bool(getattr(self._base, "is_quantized", False) and self._configs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes the adapter."""
        return is_convertible(self._base, adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the number of trainable numbers and of all numbers."""
        return count_parameters(self._base)

    def print_trainable_parameters(self) -> None:
        few, most = self.get_nb_trainable_parameters()
        print(f"trainable params: {few:,d} || all params: {most:,d} || trainable%: {100 * few / max(most, 1):.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each layer, as the function of this name returns it."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the adapters as a whole, as the function of this name returns it."""
        return get_model_status(self)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that the adapters have as targets."""
        return targeted_modules(self._base)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the parameters that the adapters have as `target_parameters`."""
        return targeted_parameters(self._base)

    @property
    def prefix(self) -> str:
        """The mark of adapters' tensors in the names of `named_parameters()`, where PEFT's is such as "lora_"."""
        return f".{RESERVED}."

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return bool(self.active_adapters) and not self._disabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that the configurations train as a whole."""
        names = {name for config in self._configs.values() for name in getattr(config, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self._base, "dtype", None)
