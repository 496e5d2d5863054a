"""Models of transformers in folders: their class, on the meta device or with weights. No code of a folder runs."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.adapter_files.entry import PEFT
from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_headers import read_header
from surgery.commands.paths import existing
from surgery.commands.weight_files import weight_files
from surgery.errors import SurgeryError, SurgeryWarning, abbreviate, near_misses

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CONFIG", "class_in_config", "load_model", "model_on_meta"]

CONFIG = "config.json"


def model_on_meta(folder: Path, class_name: str | None = None) -> nn.Module:
    """The model without weights: its modules and shapes on the meta device. Reads `config.json` alone."""
    import torch

    cls, config = _class_and_config(folder, class_name)
    with _errors_of_transformers(folder, f"can't build {cls.__name__}", _CONFIG_FIX), torch.device("meta"):
        return cls._from_config(config).eval()


def load_model(folder: Path, class_name: str | None = None) -> nn.Module:
    """The model with its weights, from safetensors files, in their own dtype and in evaluation mode."""
    cls, _ = _class_and_config(folder, class_name)
    folder = folder.parent if folder.is_file() else folder
    files, absent = weight_files(folder)
    if absent:
        why, fix = f"the index names {abbreviate(absent, 'files')}", "copy or download the absent files"
        raise SurgeryError(f"weights of {folder} are absent", why=why, fix=fix)
    if not files:
        what, fix = f"{folder} has no weights in safetensors files", "save the model with save_pretrained"
        raise SurgeryError(what, why=_files_text(folder), fix=fix)
    for file in files:  # an error of the header names its file
        read_header(file)
    options: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    with _errors_of_transformers(folder, f"can't load {cls.__name__}", _WEIGHTS_FIX):
        model, report = cls.from_pretrained(
            str(folder), **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        first = f"{name} is {tuple(stored)}, config.json gives {tuple(wanted)}"
        why = f"{len(mismatched)} tensors have other shapes, such as {first}"
        raise SurgeryError(f"the weights of {folder} don't fit {cls.__name__}", why=why, fix=_WEIGHTS_FIX)
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
        near = near_misses(
            class_name, [name for name in dir(transformers) if _is_name_of_model(name) and name != class_name]
        )
        raise SurgeryError(f"transformers has no model {class_name!r}", why=near, fix="--class takes a class name")
    fix = "commands run no code of a folder; load such a model in Python and use the functions"
    with _errors_of_transformers(file, "can't read the configuration", fix):
        config = transformers.AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    if wanted is not None and _is_model_class(transformers, wanted):
        return _checked(getattr(transformers, wanted), config, file)
    if class_name is None and type(config) in transformers.MODEL_MAPPING:
        return transformers.MODEL_MAPPING[type(config)], config
    raise SurgeryError(f"transformers has no model class for {file}", why=f"it names {wanted}", fix="--class NAME")


@contextlib.contextmanager
def _errors_of_transformers(place: Path, what: str, fix: str) -> Iterator[None]:
    """Any error of transformers, which are of many classes, as one about the folder or file."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise SurgeryError(f"transformers {what}", where=str(place), why=why, fix=fix) from error


def _files_text(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return f"it holds {abbreviate(names, 'files')}"


def _checked(cls: Any, config: Any, file: Path) -> tuple[Any, Any]:
    """The class, and the configuration that it takes: this one, or its part for the class."""
    from torch import nn

    kind = cls.config_class
    part = getattr(config, kind.base_config_key, None) if kind is not None and kind.base_config_key else None
    fitting = next((each for each in (config, part) if kind is None or isinstance(each, kind)), None)
    if cls.forward is not nn.Module.forward and fitting is not None:
        return cls, fitting
    if kind is None or fitting is not None:
        why = "it is a base class, which has no modules and no forward of its own"
    else:
        why = f"the class takes {kind.__name__}, and the file is {type(config).__name__}"
    fix = _classes_for(config, cls.__name__)
    raise SurgeryError(f"{cls.__name__} does not fit {file}", why=why, fix=fix)


def _classes_for(config: Any, name: str) -> str:
    """The option for a class that takes the configuration: the class that it names, and those most like the name."""
    import transformers
    from torch import nn

    start = type(config).__name__.removesuffix("Config")
    classes = [each for each in dir(transformers) if each.startswith(start) and _is_model_class(transformers, each)]
    fitting = [each for each in classes if getattr(transformers, each).config_class is type(config)]
    usable = [each for each in fitting if getattr(transformers, each).forward is not nn.Module.forward]
    named = [each for each in config.architectures or () if each in usable]
    near = list(dict.fromkeys([*named, *difflib.get_close_matches(name, usable), *usable]))[:3]
    return f"--class {', or '.join(near)}" if near else "--class NAME"


_FIX = "name a folder that save_pretrained wrote"
_CONFIG_FIX = "--class names another class; or mend config.json"
_WEIGHTS_FIX = "name the class that the weights were saved from with --class; or save them again with save_pretrained"


def _is_name_of_model(name: str) -> bool:
    return "For" in name or name.endswith("Model")


def _is_model_class(transformers: Any, name: str) -> bool:
    cls = getattr(transformers, name, None)
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
