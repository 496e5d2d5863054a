"""Which adapters a façade has and which of them are active, as PEFT counts it: kept beside what the engine knows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from surgery.activation import activate, active, deactivate, using
from surgery.engine import remove
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.merging import unmerge
from surgery.peft.config import PeftConfig
from surgery.peft.defaults import heads_of
from surgery.peft.facade import Facade, trained
from surgery.state import adapter_names, model_state, require_state, sites

__all__ = ["Adapted"]

Names = str | Sequence[str]


class Adapted(Facade):
    """A façade with configurations: one adapter or several are active, and with `disable_adapter_layers` none is live.

    In PEFT an adapter stays active while its layers are disabled; the engine knows live ones alone.
    """

    __slots__ = ()
    _task: str | None = None

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations by adapter."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        state = model_state(self._base)
        live = list(active(self._base)) if state is not None else []
        return live if self._off is None else [name for name in self._off if state and name in state.adapters]

    @property
    def active_adapter(self) -> Any:
        """The active adapter's name; a list where there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> Any:
        return self._config(self.active_adapters[0]) if self.active_adapters else None

    @property
    def peft_type(self) -> Any:
        found = self.active_peft_config or next(iter(self._configs.values()), None)
        return found.peft_type if found is not None else None

    # Which are active ---------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: Names, inference_mode: bool = False) -> None:
        """Make these adapters live and trainable, and no others; `inference_mode`: live, and frozen."""
        names = adapter_names(require_state(self._base), adapter_name)
        self._unmerged("set_adapter")
        before = {name: self._frozen[name] for name in names if name in self._frozen}
        self._frozen.update(dict.fromkeys(names, inference_mode))
        try:
            if self._off is None:
                self._enter(names)
        except SurgeryError:
            self._frozen.update(before)
            raise
        if self._off is not None:
            self._off = tuple(names)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        """Whether adapters train."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._config(name)
            self._frozen[name] = not requires_grad
        if self._off is None:
            self._flag(self.active_adapters)

    def disable_adapter_layers(self) -> None:
        """The base's bits, until `enable_adapter_layers`."""
        if self._off is None and model_state(self._base) is not None:
            self._unmerged("disable_adapter_layers")
            names = tuple(self.active_adapters)
            deactivate(self._base)
            self._off = names

    def enable_adapter_layers(self) -> None:
        if self._off is not None:
            names = self.active_adapters
            self._off = None
            self._enter(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model gives the base's bits."""
        if self._off is not None or model_state(self._base) is None:
            yield
            return
        self._unmerged("disable_adapter")
        names = tuple(self.active_adapters)
        with using(self._base, None):
            self._off = names
            try:
                yield
            finally:
                self._off = None

    # Inside -------------------------------------------------------------------------------------------------------

    def _prepared(self, given: Any) -> Any:
        """A configuration of PEFT's or ours as one of ours, with the heads that go with its task."""
        if not hasattr(given, "to_dict"):
            raise SurgeryError(f"{given!r} is no configuration", fix="pass a LoraConfig, or another of its kind")
        config: Any = copy.copy(given) if isinstance(given, PeftConfig) else PeftConfig.from_dict(given.to_dict())
        heads = heads_of(self._task or config.task_type)
        if heads and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        name = getattr(getattr(self._base, "config", None), "_name_or_path", None)
        config.base_model_name_or_path = config.base_model_name_or_path or name or None
        return config

    @contextmanager
    def _joining(self, name: str, config: Any) -> Iterator[None]:
        """A new adapter is put on; those that were active stay so, and if that can't be, it goes again."""
        before, state = self.active_adapters, model_state(self._base)
        alone = state is None or not state.adapters
        yield
        self._joined(name, config)
        try:
            self._flag([name])
            self._enter([name] if alone else [] if self._off is not None else before)
        except SurgeryError:
            remove(self._base, name)
            self._dropped(name)
            raise

    def _joined(self, name: str, config: Any) -> None:
        self._configs[name] = config
        self._trained[name] = trained(self._base, name)
        self._frozen[name] = config.inference_mode

    def _dropped(self, name: str) -> None:
        for held in (self._configs, self._trained, self._frozen):
            held.pop(name, None)

    def _enter(self, names: Sequence[str]) -> None:
        activate(self._base, list(names))
        self._flag(names)

    def _flag(self, names: Sequence[str]) -> None:
        """Live adapters train, if they are not frozen."""
        chosen = {key: not self._frozen[name] for name in names for key in self._trained.get(name, ())}
        for key, parameter in self._base.named_parameters():
            if key in chosen:
                parameter.requires_grad_(chosen[key])

    def _merged(self) -> bool:
        return any(site.merged is not None for _, _, site in sites(self._base))

    def _unmerged(self, verb: str) -> None:
        if self._merged():
            warnings.warn(f"{verb}: the model is merged, and is unmerged first", SurgeryWarning, stacklevel=3)
            unmerge(self._base)

    def _config(self, name: str) -> Any:
        adapter_names(require_state(self._base), name)
        if name not in self._configs:
            why = "its rules were applied by themselves"
            raise SurgeryError(f"the adapter {name!r} has no configuration of PEFT's", why=why)
        return self._configs[name]
