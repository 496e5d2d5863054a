"""Models that transformers loaded through a quantiser, and what their checkpoints can hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.packed.packed_parameters import packed_in
from surgery.patterns.module_walk import base_modules
from surgery.transaction.undo_log import Journal

__all__ = ["write_as_ordinary"]


def write_as_ordinary(model: Any, journal: Journal) -> None:
    """Let `save_pretrained` write a model whose quantised file was read into ordinary weights, such as a GGUF file.

    transformers refuses these models, although nothing in them is packed. The mark of the file is taken off, until the
    journal puts it back.

    Raises:
        SurgeryError: the weights are packed, and their quantiser can't write them.
    """
    quantiser = model.__dict__.get("hf_quantizer")
    if quantiser is None or quantiser.is_serializable():
        return
    method = getattr(quantiser.quantization_config.quant_method, "value", quantiser.quantization_config.quant_method)
    if packed := [path for path, module in base_modules(model) if _is_packed(module)]:
        raise SurgeryError(
            f"transformers can't write a model that is quantised by {method}",
            where=abbreviate(packed),
            why="their weights are packed, and this quantiser has no files for them",
            fix="save_adapter(model, folder) writes the adapter alone",
        )
    journal.keep(model.__dict__, model.config.__dict__)
    del model.hf_quantizer
    model.config.__dict__.pop("quantization_config", None)


def _is_packed(module: nn.Module) -> bool:
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    return bool(packed_in(module)) or any(not tensor.is_floating_point() for tensor in own)
