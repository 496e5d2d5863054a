"""The names of an adapter's files, and `Entry`, the place of a tensor in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the names of files are read without torch, too
    from torch import Tensor

__all__ = ["Entry", "PeftEntry", "as_it_is", "names_in"]

SURGERY = ("adapter.safetensors", "rules.json")
PEFT = ("adapter_model.safetensors", "adapter_config.json")
OLD = "adapter_model.bin"
BARE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers': tensors without settings
MODEL = ("surgery.safetensors", "surgery.json")  # all adapters of a model
NAME, MODEL_NAME, VERSION = "model-surgery adapter", "model-surgery model", 1


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Entry(NamedTuple):
    """A tensor's key in a file, and the conversions from the file to the adapter and back."""

    key: str
    read: Callable[[Tensor], Tensor] = as_it_is
    write: Callable[[Tensor], Tensor] = as_it_is


PeftEntry = Entry  # the public name, for code that adds a PEFT method


def names_in(folder: Path) -> tuple[str, str | None] | None:
    """Returns the names of a folder's tensor file and settings file; None if it has no adapter."""
    for tensors, settings in (SURGERY, PEFT, (OLD, PEFT[1]), *((bare, None) for bare in BARE)):
        if (folder / tensors).is_file():
            return tensors, settings
    return None
