"""An adapter as low-rank changes and whole tensors, from PEFT's configuration and tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError
from surgery.storage.formats.contents import BaseFacts, Contents
from surgery.storage.formats.file_tensor import FileTensor, tensor_of
from surgery.storage.formats.peft_settings import KIND_OF
from surgery.storage.formats.reading import read_contents
from surgery.storage.formats.split import split_keys
from surgery.storage.formats.table import format_named

__all__ = ["DescribedAdapter", "from_peft_files"]

# Fields of PEFT's configuration that are about tensors which the adapter holds in full.
_WHOLE = ("modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying")
_STARTS = ("pissa", "olora", "loftq", "corda")  # values of init_lora_weights that change the base's weights


@dataclass
class DescribedAdapter:
    """What an adapter changes.

    `contents`: low-rank and other changes by path. `whole`: path → name → a tensor that the adapter holds in full.
    `converted`: path → (the rules that were converted to LoRA, its rank, the share of ΔW that is lost). `problems`:
    what no program takes. `rslora`: the file says scales in rsLoRA's way. `start`: the way of initialising that changed
    the base's weights; "" if none did.
    """

    contents: Contents
    whole: dict[str, dict[str, FileTensor]] = field(default_factory=dict)
    converted: dict[str, tuple[str, int, float]] = field(default_factory=dict)
    problems: list[SurgeryError] = field(default_factory=list)
    start: str = ""
    rslora: bool = False

    def copied(self) -> DescribedAdapter:
        """A copy whose changes may be edited. Tensors are shared."""
        contents = copy.copy(self.contents)
        contents.changes = {
            component: {
                path: dataclasses.replace(change, tensors=dict(change.tensors)) for path, change in changes.items()
            }
            for component, changes in self.contents.changes.items()
        }
        contents.notes = list(contents.notes)
        return dataclasses.replace(self, contents=contents)


def from_peft_files(fields: Mapping[str, Any], file: TensorFile, facts: BaseFacts) -> DescribedAdapter:
    """Describes PEFT's configuration and tensors. `SurgeryError` if its method is not among those of the formats."""
    if (method := fields.get("peft_type", "LORA")) not in KIND_OF:
        raise SurgeryError(f"PEFT's {method} is not a change by low-rank factors")
    peft = format_named("peft")
    (start,) = (prefix.text for prefix in peft.prefixes)
    split, others = split_keys(peft, file.shapes)
    whole: dict[str, dict[str, FileTensor]] = {}
    for key in others:
        if key.startswith(start):
            path, _, name = key.removeprefix(start).rpartition(".")
            whole.setdefault(path.removesuffix(".base_layer"), {})[name] = tensor_of(file, key)
    keys = [key for key in file.shapes if key in split or not key.startswith(start)]
    kept = TensorFile(
        {key: file.shapes[key] for key in keys}, {key: file.dtypes[key] for key in keys}, file.metadata, file.read
    )
    init = fields.get("init_lora_weights")
    changed = init if isinstance(init, str) and init.lower().startswith(_STARTS) else ""
    contents = read_contents(peft, kept, {name: fields[name] for name in fields if name not in _WHOLE}, facts)
    return DescribedAdapter(contents, whole, start=changed, rslora=bool(fields.get("use_rslora")))
