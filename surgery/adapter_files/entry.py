"""The names of an adapter's files, and the entry that says where in a file each of its tensors stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

__all__ = ["Entry", "PeftEntry", "as_it_is", "names_in"]

SURGERY = ("adapter.safetensors", "rules.json")
PEFT = ("adapter_model.safetensors", "adapter_config.json")
OLD = "adapter_model.bin"
BARE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers': tensors without settings
NAME, VERSION = "model-surgery adapter", 1


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Entry(NamedTuple):
    """Where a tensor of an adapter stands in a file, and how the two are turned into each other."""

    key: str
    read: Callable[[Tensor], Tensor] = as_it_is
    write: Callable[[Tensor], Tensor] = as_it_is


PeftEntry = Entry  # its public name: whoever brings a PEFT method makes them


def names_in(folder: Path) -> tuple[str, str | None] | None:
    """The names of the tensors and the settings of the adapter in a folder, or None."""
    for tensors, settings in (SURGERY, PEFT, (OLD, PEFT[1]), *((bare, None) for bare in BARE)):
        if (folder / tensors).is_file():
            return tensors, settings
    return None
