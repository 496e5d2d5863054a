"""Example calls of models: from a file of tensors, or made for the model's main input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.adapter_files.tensor_headers import read_header
from surgery.commands.model_folder import load_model, model_on_meta
from surgery.commands.paths import existing
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["example_call", "model_and_call"]


def model_and_call(
    folder: Path, class_name: str | None, file: Path | None, with_example: bool, *, weights: bool = False
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The model, and its example call if one is asked for; without a call, and unless `weights`, on the meta device."""
    wanted = file is not None or with_example
    model = load_model(folder, class_name) if weights or wanted else model_on_meta(folder, class_name)
    return model, example_call(model, file) if wanted else None


def example_call(model: nn.Module, file: Path | None, batch: int = 2, length: int = 8) -> dict[str, Any]:
    """Arguments of a call by name: the tensors of a safetensors file, or random ones of the model's main input."""
    if file is not None:
        from safetensors.torch import load_file

        if existing(file).suffix != ".safetensors":
            fix = 'safetensors.torch.save_file({"input_ids": ids, …}, "example.safetensors")'
            raise SurgeryError(f"{file} is not a safetensors file", why="an example is tensors by name", fix=fix)
        read_header(file)  # an error of the header names the file
        return dict(load_file(file))
    import torch

    example = _made(model, batch, length)
    try:
        with torch.no_grad():
            model(**example)
    except Exception as error:  # models raise errors of any class
        why = f"it can't be called with {', '.join(example)} made for it: {type(error).__name__}: {error}"[:300]
        raise SurgeryError("the model needs an example call", why=why, fix=_FIX) from error
    return example


_FIX = "--example FILE.safetensors, with the tensors of one call by name"


def _made(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Random arguments for the model's main input, if it is a text or images."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = getattr(config, "get_text_config", lambda: config)()
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and isinstance(getattr(text, "vocab_size", None), int):
        ids = torch.randint(0, text.vocab_size, (batch, length), generator=generator)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return example | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, (int, list, tuple)):
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(config, "num_channels", 3)
        images = torch.randn(batch, channels, height, width, generator=generator)
        return {"pixel_values": images.to(model.dtype)}
    why = f"no example can be made for the input {name!r}"
    raise SurgeryError("the model needs an example call", why=why, fix=_FIX)
