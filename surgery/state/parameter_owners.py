"""Finds the modules that own a parameter, with one walk of the model for a whole call."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules

__all__ = ["Owners"]


class Owners:
    """Maps each parameter of a model to the names of its owners. Aliases of one module count once.

    The first lookup walks the model. The caller then reports each parameter that it replaces (`note_replacement`), so
    a call that changes a thousand sites walks the model once.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._places: dict[int, tuple[Tensor, dict[tuple[int, str], str]]] | None = None

    def of(self, parameter: Tensor) -> list[str]:
        """Returns the names under which the model has this parameter object."""
        entry = self._map().get(id(parameter))
        return list(entry[1].values()) if entry is not None else []

    def note_replacement(self, module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
        """Record that the parameter `name` of `module` is now `new` and no longer `old`."""
        entries = self._map()
        place = (id(module), name)
        path = entries[id(old)][1].pop(place, name) if id(old) in entries else name
        entries.setdefault(id(new), (new, {}))[1][place] = path

    def _map(self) -> dict[int, tuple[Tensor, dict[tuple[int, str], str]]]:
        if self._places is None:
            self._places = {}
            for path, module in base_modules(self._model):
                for name, tensor in module._parameters.items():
                    if tensor is not None:
                        places = self._places.setdefault(id(tensor), (tensor, {}))[1]
                        places[id(module), name] = f"{path}.{name}" if path else name
        return self._places
