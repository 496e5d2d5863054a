"""The base model without its weights: built from `config.json` on the meta device, its parameters mapped from files.

Mapped parameters are read where they are touched alone, so rules that compare a few numbers of the base can do so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter_files.plain_json import read_json
from surgery.checkpoints.checkpoint_files import CheckpointFiles
from surgery.checkpoints.name_map import NameMap, name_map
from surgery.errors import MergeError, SurgeryError
from surgery.model_edits.tied_parts import ALL, tied_parts
from surgery.patterns.module_walk import base_modules

__all__ = [
    "CONFIG",
    "Skeleton",
    "base_names",
    "base_skeleton",
    "check_not_quantised",
    "quantisation_of",
    "read_config",
    "tensor_places",
]

CONFIG = "config.json"


@dataclass
class Skeleton:
    """A model without weights, and the map of its names.

    `aliases`: for each further name of a shared tensor, its first name that is in the files. `twins`: for a name, the
    further names of its tensor that are in the files, too.
    """

    model: nn.Module
    names: NameMap
    aliases: dict[str, str] = field(default_factory=dict)
    twins: dict[str, list[str]] = field(default_factory=dict)

    def link_names(self) -> None:
        """Finds the names of shared tensors; to be called again when tensors are no longer shared."""
        self.aliases, self.twins = {}, {}
        known = self.model.state_dict().keys()
        by_tensor: dict[int, list[str]] = {}
        for name, (_, _, tensor) in tensor_places(self.model).items():
            if name in known:
                by_tensor.setdefault(id(tensor), []).append(name)
        for group in by_tensor.values():
            stored = [name for name in group if name in self.names.of_memory]
            if stored and len(group) > 1:
                self.aliases |= {name: stored[0] for name in group if name != stored[0]}
                self.twins[stored[0]] = stored[1:]


def base_skeleton(files: CheckpointFiles, model: nn.Module | None = None) -> Skeleton:
    """Returns the model of a checkpoint with parameters that are mapped from its files.

    `model`: a model on the meta device, which is changed. Default None: that of `config.json`.

    Raises:
        SurgeryError: transformers does not have the model, or the weights do not fit it.
    """
    model = _model_of(files.folder) if model is None else model
    names = name_map(model, files)
    _break_unequal_ties(model, files, names)
    _map_tensors(model, files, names)
    skeleton = Skeleton(model, names)
    skeleton.link_names()
    return skeleton


def base_names(files: CheckpointFiles, model: nn.Module | None = None) -> NameMap:
    """Returns the map of a checkpoint's names."""
    return name_map(_model_of(files.folder) if model is None else model, files)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`; empty without this file."""
    if not (folder / CONFIG).is_file():
        return {}
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        raise SurgeryError(f"{CONFIG} is damaged", where=str(folder), why="it is not a mapping")
    return data


def quantisation_of(folder: Path) -> str | None:
    """The method by which the configuration says that the weights are quantised; None if it does not."""
    config = read_config(folder)
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        settings = part.get("quantization_config")
        if settings:
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            return str(method)[:100]
    return None


def check_not_quantised(folder: Path) -> None:
    """Raises `MergeError` if the configuration says that the weights are quantised."""
    method = quantisation_of(folder)
    if method is not None:
        raise MergeError(
            "the base is quantised",
            where=str(folder / CONFIG),
            why=f"its weights are packed by {method}, so a sum would be rounded away",
            fix="merge into the base as it was before it was quantised, and quantise the result; or load it, and "
            'merge_to(model, folder, quantised="dequantise"); or, for mxfp4 and fp8, '
            'merge_files(…, quantised="dequantise")',
        )


def _model_of(folder: Path) -> nn.Module:
    config_data = read_config(folder)
    fix = "merge_files(…, model=model) takes a model on the meta device"
    if "model_type" not in config_data:
        why = f"there is no {CONFIG} with a model_type"
        raise SurgeryError(f"{folder} is not a checkpoint of transformers", why=why, fix=fix)
    import transformers

    wanted = config_data.get("architectures")
    name = wanted[0] if isinstance(wanted, list) and wanted and isinstance(wanted[0], str) else None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        cls = getattr(transformers, name, None) if name is not None else transformers.MODEL_MAPPING[type(config)]
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise SurgeryError(f"transformers has no model {name!r}", where=str(folder / CONFIG), fix=fix)
        with torch.device("meta"):
            return cls._from_config(config).eval()  # type: ignore[attr-defined]
    except SurgeryError:
        raise
    except Exception as error:  # transformers raises errors of many classes
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        what = "transformers can't build the model of this folder"
        raise SurgeryError(what, where=str(folder), why=why, fix=fix) from error


def tensor_places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str, Tensor]]:
    """Each name of a tensor of the model, with the mapping that holds the tensor."""
    places: dict[str, tuple[dict[str, Any], str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    places[f"{path}.{name}" if path else name] = holder, name, tensor
    return places


def _break_unequal_ties(model: nn.Module, files: CheckpointFiles, names: NameMap) -> None:
    """Unties weights that the configuration ties and the files hold with different values, as transformers does."""
    by_tensor: dict[int, list[str]] = {}
    places = tensor_places(model)
    for name, (_, _, tensor) in places.items():
        group = names.of_memory.get(name)
        if isinstance(tensor, nn.Parameter) and group is not None and group.conversion is None:
            by_tensor.setdefault(id(tensor), []).append(name)
    for first, *others in by_tensor.values():
        for name in others:
            holder, last, tensor = places[name]
            disk, first_disk = names.of_memory[name].disk[0], names.of_memory[first].disk[0]
            if torch.equal(files.read(disk), files.read(first_disk)):
                continue
            if holder is places[first][0]:  # one module under two names
                why = f"it is the same tensor of the model as {first}, and has other values"
                fix = "save the model again with save_pretrained, which stores it once"
                raise SurgeryError("the files contradict each other", where=name, why=why, fix=fix)
            holder[last] = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
            for path, part in tied_parts(model):
                ties = getattr(part, ALL, None)
                if isinstance(ties, dict):
                    ties.pop(name.removeprefix(f"{path}.") if path else name, None)


def _map_tensors(model: nn.Module, files: CheckpointFiles, names: NameMap) -> None:
    """Gives the model's parameters and buffers the dtype of the files, mapped where it is possible."""
    replaced: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # so that no id is used twice
    tensors = files.tensors
    for name, (_, _, old) in tensor_places(model).items():
        group = names.of_memory.get(name)
        if group is None or id(old) in replaced:
            continue
        dtype = tensors[group.disk[0]].dtype
        if dtype is None:
            continue
        shard = files.shards[files.shard_of[group.disk[0]]]
        new = shard.mapped(group.disk[0]) if group.conversion is None else None
        new = torch.empty(old.shape, dtype=dtype, device="meta") if new is None else new
        if isinstance(old, nn.Parameter):
            numbers = dtype.is_floating_point or dtype.is_complex
            new = nn.Parameter(new, requires_grad=old.requires_grad and numbers)
        replaced[id(old)] = new
        kept.append(old)
    for _, module in base_modules(model):
        for holder in (module._parameters, module._buffers):
            for name, tensor in list(holder.items()):
                if tensor is not None and id(tensor) in replaced:
                    holder[name] = replaced[id(tensor)]  # type: ignore[assignment]
