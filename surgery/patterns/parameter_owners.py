"""Which modules hold a parameter: read once for a whole call, not once for each site."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules

__all__ = ["Owners"]


class Owners:
    """The modules that hold each parameter of a model, by name; aliases of one module count once.

    The model is walked at the first question. After that the caller tells of each parameter that it replaces
    (`replaced`), so a call that changes a thousand sites walks the model once.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._held: dict[int, tuple[Tensor, dict[tuple[int, str], str]]] | None = None

    def of(self, parameter: Tensor) -> list[str]:
        """The names under which the model holds this parameter object."""
        found = self._map().get(id(parameter))
        return list(found[1].values()) if found is not None else []

    def replaced(self, module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
        """`module` now holds `new` in the place of `old` as its own parameter `name`."""
        held = self._map()
        place = (id(module), name)
        path = held[id(old)][1].pop(place, name) if id(old) in held else name
        held.setdefault(id(new), (new, {}))[1][place] = path

    def _map(self) -> dict[int, tuple[Tensor, dict[tuple[int, str], str]]]:
        if self._held is None:
            self._held = {}
            for path, module in base_modules(self._model):
                for name, tensor in module._parameters.items():
                    if tensor is not None:
                        places = self._held.setdefault(id(tensor), (tensor, {}))[1]
                        places[id(module), name] = f"{path}.{name}" if path else name
        return self._held
