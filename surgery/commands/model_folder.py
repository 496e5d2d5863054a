"""Models of transformers in folders: their class, on the meta device or with weights. No code of a folder runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.adapter_files.entry import PEFT
from surgery.adapter_files.plain_json import read_json
from surgery.commands.paths import existing
from surgery.errors import SurgeryError, SurgeryWarning, abbreviate, near_misses

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CONFIG", "class_in_config", "load_model", "model_on_meta"]

CONFIG = "config.json"


def model_on_meta(folder: Path, class_name: str | None = None) -> nn.Module:
    """The model without weights: its modules and shapes on the meta device. Reads `config.json` alone."""
    import torch

    cls, config = _class_and_config(folder, class_name)
    with torch.device("meta"):
        return cls._from_config(config).eval()


def load_model(folder: Path, class_name: str | None = None) -> nn.Module:
    """The model with its weights, from safetensors files, in their own dtype and in evaluation mode."""
    cls, _ = _class_and_config(folder, class_name)
    folder = folder.parent if folder.is_file() else folder
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    try:
        model, report = cls.from_pretrained(str(folder), **options, output_loading_info=True)
    except OSError as error:
        if any(folder.glob("*.safetensors")):
            raise
        what, fix = f"{folder} has no weights in safetensors files", "save the model with save_pretrained"
        raise SurgeryError(what, why=str(error).partition("\n")[0], fix=fix) from error
    if missing := sorted(report["missing_keys"]):
        listed = abbreviate(missing, "tensors")
        warnings.warn(f"the files of {folder} lack {listed}: they have random values", SurgeryWarning, stacklevel=2)
    return model.eval()


def class_in_config(config: Any) -> str | None:
    """The name of the class that a `config.json` was written for."""
    names = config.get("architectures") if isinstance(config, dict) else None
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _class_and_config(folder: Path, class_name: str | None) -> tuple[Any, Any]:
    """The class of transformers, and the configuration."""
    file = existing(folder) / CONFIG if folder.is_dir() else existing(folder)
    if file.name != CONFIG or not file.is_file():
        raise SurgeryError(f"{folder} is not a model of transformers", why=f"there is no {CONFIG}", fix=_FIX)
    if (file.parent / PEFT[1]).is_file():  # transformers would load it, and the base that it names
        why = f"{PEFT[1]} is there, too"
        raise SurgeryError(f"{file.parent} holds an adapter", why=why, fix="name the folder of its base as MODEL")
    data = read_json(file)
    if not isinstance(data, dict) or "model_type" not in data:
        raise SurgeryError(f"{file} is not a configuration of transformers", why="it has no model_type", fix=_FIX)
    import transformers

    wanted = class_name or class_in_config(data)
    if class_name is not None and not _is_model_class(transformers, class_name):
        near = near_misses(class_name, [name for name in dir(transformers) if _is_name_of_model(name)])
        raise SurgeryError(f"transformers has no model {class_name!r}", why=near, fix="--class takes a class name")
    try:
        config = transformers.AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    except ValueError as error:
        why = str(error).partition("\n")[0][:300]
        fix = "commands run no code of a folder; load such a model in Python and use the functions"
        raise SurgeryError(f"transformers can't read {file}", why=why, fix=fix) from error
    if wanted is not None and _is_model_class(transformers, wanted):
        return getattr(transformers, wanted), config
    if class_name is None and type(config) in transformers.MODEL_MAPPING:
        return transformers.MODEL_MAPPING[type(config)], config
    raise SurgeryError(f"transformers has no model class for {file}", why=f"it names {wanted}", fix="--class NAME")


_FIX = "name a folder that save_pretrained wrote"


def _is_name_of_model(name: str) -> bool:
    return "For" in name or name.endswith("Model")


def _is_model_class(transformers: Any, name: str) -> bool:
    cls = getattr(transformers, name, None)
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
