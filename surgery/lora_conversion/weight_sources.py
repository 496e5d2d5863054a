"""The weights of a base and of its fine-tune under the names of the model, one at a time, from folders or models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints.base_skeleton import base_skeleton, quantisation_of
from surgery.checkpoints.checkpoint_files import open_checkpoint
from surgery.errors import SurgeryError
from surgery.forward.parameter_view import tensor_at
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import is_offloaded
from surgery.state.records import model_state, sites

__all__ = ["WeightSource", "open_source"]


@dataclass
class WeightSource:
    """A model whose weights are read one at a time. `label`: its folder, or what it is, for errors.

    `model` has the structure and, where they can be mapped, the weights. Changing it changes no one else's model.
    """

    label: str
    model: nn.Module
    read: Callable[[str], Tensor]

    def names(self) -> dict[str, Tensor]:
        """The tensors that the model saves, under all their names."""
        saved = self.model.state_dict(keep_vars=True).keys()
        found: dict[str, Tensor] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    key = f"{path}.{name}" if path else name
                    if tensor is not None and key in saved:
                        found[key] = tensor
        return found


def open_source(source: str | Path | nn.Module, role: str) -> WeightSource:
    """Opens a folder with a transformers checkpoint, or a model. Nothing is read yet.

    Raises:
        SurgeryError: the folder holds no checkpoint that transformers can build, or the model has adapters.
    """
    if isinstance(source, nn.Module):
        return _of_model(source, role)
    if not isinstance(source, (str, Path)):
        raise SurgeryError(f"the {role} is a {type(source).__name__}", fix="give a folder or a model")
    if (method := quantisation_of(Path(source))) is not None:
        why, fix = f"its weights are packed by {method}", "name the model as it was before it was quantised"
        raise SurgeryError(f"the {role} is quantised", where=str(source), why=why, fix=fix)
    files = open_checkpoint(Path(source))
    skeleton = base_skeleton(files)
    names, converted = skeleton.names, dict[str, Tensor]()

    def read(name: str) -> Tensor:
        group = names.of_memory.get(skeleton.aliases.get(name, name))
        if group is None:
            fix = "save the model again, or name the folder that it was saved to"
            raise SurgeryError(f"{source} does not have the weight {name}", fix=fix)
        if group.conversion is None:
            return files.read(group.disk[0])
        if name not in converted:  # several tensors of the files become one; the last result is kept
            converted.clear()
            converted.update(group.to_memory({key: files.read(key) for key in group.disk}))
        return converted[name]

    return WeightSource(str(source), skeleton.model, read)


def _of_model(model: nn.Module, role: str) -> WeightSource:
    if model_state(model) is not None or any(True for _ in sites(model)):
        why = "its weights alone do not say what it computes"
        raise SurgeryError(f"the {role} has adapters", why=why, fix="merge and forget them, or remove them")
    modules = dict(base_modules(model))
    if any(is_offloaded(module) for module in modules.values()):
        raise SurgeryError(f"the {role} is offloaded by accelerate", fix="name the folder that it was loaded from")
    if empty := next((name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta), None):
        why = "it is on the meta device"
        raise SurgeryError(
            f"the {role} has no values", where=empty, why=why, fix="load its weights, or name its folder"
        )
    memo: dict[int, Any] = {}
    for module in modules.values():
        for kind in (module._parameters, module._buffers):
            for tensor in kind.values():
                if tensor is not None:
                    alias = tensor.detach()
                    memo[id(tensor)] = (
                        nn.Parameter(alias, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else alias
                    )
    kept = list(memo.values())  # so that no id is used twice
    structure = copy.deepcopy(model, memo)
    del kept

    def read(name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        return tensor_at(model.get_submodule(path), last).detach()

    return WeightSource(f"the {role}", structure, read)
