"""What a model, a folder or a configuration says of the base: paths of modules, and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_headers import read_header
from surgery.errors import SurgeryError
from surgery.patterns.module_walk import base_modules
from surgery.peft_format.key_history import COMPONENTS
from surgery.storage.formats.contents import BaseFacts

__all__ = ["COMPONENT_CLASSES", "base_facts", "component_of", "components_in", "facts_of_model"]

# The component of a pipeline that a class of model is, by the beginning and the end of its name.
COMPONENT_CLASSES = (
    ("UNet", "", "unet"), ("ControlNet", "", "controlnet"), ("CLIPTextModel", "CLIPTextModel", "text_encoder"),
    ("", "Transformer2DModel", "transformer"), ("", "Transformer3DModel", "transformer"),
    ("PriorTransformer", "", "prior"),
)  # fmt: skip
# Components of classes that stand in different places of different pipelines, such as the first, second or third.
_SHARED_CLASSES = ("CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel")


def facts_of_model(model: nn.Module) -> BaseFacts:
    modules = dict(base_modules(model))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        config = {}
    is_embedding = lambda path: isinstance(modules[path], nn.Embedding)  # noqa: E731
    parts = {name: facts_of_model(part) for name, part in components_in(model).items()}
    return BaseFacts(modules.keys() - {""}, dict(config), is_embedding, type(model).__name__, parts)


def components_in(model: nn.Module) -> dict[str, nn.Module]:
    """The components of a pipeline that stand in one module under their names, such as those of an `nn.ModuleDict`."""
    children = model.named_children()
    return {name: child for name, child in children if name in COMPONENTS and _is_component(type(child).__name__)}


def _is_component(kind: str) -> bool:
    return bool(component_of(kind)) or kind in _SHARED_CLASSES


def base_facts(base: nn.Module | str | Path | Mapping[str, Any] | None) -> BaseFacts:
    """What is known of a base: a model, a folder with `config.json` and safetensors, or a configuration."""
    if base is None:
        return BaseFacts()
    if isinstance(base, nn.Module):
        return facts_of_model(base)
    if isinstance(base, Mapping):
        return BaseFacts(config=dict(base))
    folder = Path(base)
    if not (folder / "config.json").is_file():
        raise SurgeryError(f"{folder} is not the folder of a model", why="it does not contain config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise SurgeryError(f"the config.json of {folder} is not a mapping")
    keys = [key for file in sorted(folder.glob("*.safetensors")) for key in read_header(file).tensors]
    paths = {key.rpartition(".")[0] for key in keys} - {""}
    return BaseFacts(paths or None, config, kind=str(config.get("_class_name") or ""))


def component_of(kind: str) -> str:
    """The component of a pipeline that a class of model is, by its name; "" if that does not show it."""
    for start, end, component in COMPONENT_CLASSES:
        if kind.startswith(start) and kind.endswith(end):
            return component
    return ""
