"""Files of adapters as other programs write them, built by their naming, and models to load them onto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.adapter_files.tensor_files import TensorFile

__all__ = ["change_of", "low_rank", "model_of_paths", "random", "same", "tensor_file", "write"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(name: str, out: int, inner: int, rank: int, alpha: float | None, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA as sd-scripts writes it."""
    tensors = {
        f"{name}.lora_down.weight": random(rank, inner, seed=seed),
        f"{name}.lora_up.weight": random(out, rank, seed=seed + 1),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def model_of_paths(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model with these modules at these paths."""
    model = nn.Module()
    for path, layer in layers.items():
        *outer, last = path.split(".")
        place = model
        for name in outer:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, layer)
    return model


def change_of(model: nn.Module, path: str, x: Tensor, base: nn.Module) -> Tensor:
    """What the adapter adds to a module's output."""
    return model.get_submodule(path)(x) - base.get_submodule(path)(x)


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(header or {}))
    return path


def tensor_file(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> TensorFile:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    return TensorFile(shapes, dtypes, dict(header or {}), tensors.__getitem__)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor], leave: Sequence[str] = ()) -> bool:
    """Whether two files hold the same tensors under the same keys, to the bit."""
    keys = {key for key in first if not key.endswith(tuple(leave) or "\n")}
    others = {key for key in second if not key.endswith(tuple(leave) or "\n")}
    return keys == others and all(torch.equal(first[key], second[key]) for key in keys)
