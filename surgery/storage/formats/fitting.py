"""Brings a change into the terms of a rule: in the shape of the model's module, and as LoRA where no rule fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.state.base_tensors import base_tensor
from surgery.storage.formats.contents import Change
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.lokr_factor import lokr_fields

__all__ = ["fitted_change"]


def fitted_change(change: Change, path: str, module: nn.Module | None, assumed: list[str]) -> Change:
    """The change for the module at a path of the model. `assumed` gets what was done to its form."""
    if change.kind in ("difference", "bias difference"):
        _tell(assumed, "changes in full are loaded as LoRA of full rank, with an identity matrix")
        return _difference(change, module)
    if change.kind == "lokr":
        return _lokr(change, module, assumed)
    if change.kind in ("oft", "glora"):
        weight = _weight(change, path, module)
        if change.kind == "glora":
            _tell(assumed, "GLoRA is loaded as LoRA of twice the rank, whose B holds a product with the base's weight")
            return _glora(change, weight)
        _tell(assumed, "OFT of LyCORIS is loaded as LoRA of full rank: the difference that it makes at this base")
        return _difference(Change("difference", {"diff": FileTensor.of(_oft(change, weight), change.key)}), module)
    return _lora(change, module, assumed) if change.kind == "lora" else change


def _tell(assumed: list[str], what: str) -> None:
    if what not in assumed:
        assumed.append(what)


def _weight(change: Change, path: str, module: nn.Module | None) -> Tensor:
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        what = f"the {change.kind} of this module depends on the base's weight, and the model has none at its path"
        raise SurgeryError(what, where=change.key, why=f"it is {path} here")
    return base_tensor(module, "weight", path)


def _lora(change: Change, module: nn.Module | None, assumed: list[str]) -> Change:
    tensors = dict(change.tensors)
    if "mid" in tensors:
        middle, down = tensors.pop("mid"), tensors["A"]
        shape = (middle.shape[0], down.shape[1], *middle.shape[2:])
        tensors["A"] = FileTensor(shape, down.dtype, lambda: _inner(middle.read(), down.read()), middle.key)
        _tell(assumed, "lora_mid is multiplied into lora_down, to one kernel")
    kernel = len(getattr(module, "kernel_size", ())) if module is not None else None
    for part in ("A", "B"):
        tensor = tensors[part]
        if kernel == 0 and len(tensor.shape) > 2 and not set(tensor.shape[2:]) - {1}:
            tensors[part] = tensor.convert(lambda value: value.flatten(1))
            _tell(assumed, "kernels of size 1 are loaded as the matrices of Linears")
        elif kernel and len(tensor.shape) == 2:
            tensors[part] = tensor.convert(lambda value, kernel=kernel: value.reshape(*value.shape, *[1] * kernel))
            _tell(assumed, "matrices are loaded as kernels of size 1")
    return Change("lora", tensors, change.scale, change.rank, change.embedding)


def _inner(middle: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("iq...,qj->ij...", middle, down.flatten(1)).contiguous()


def _difference(change: Change, module: nn.Module | None) -> Change:
    """A change in full as a LoRA whose other half is an identity matrix; a bias as the bias of its second half."""
    tensors: dict[str, FileTensor] = {}
    if "diff" in change.tensors:
        diff = change.tensors["diff"]
        if len(diff.shape) < 2:
            raise SurgeryError("the difference of a vector can't be represented as LoRA", where=diff.key)
        out, kernel = diff.shape[0], diff.shape[2:]
        if kernel or out <= diff.shape[1]:
            eye = torch.eye(out, dtype=diff.dtype).reshape(out, out, *[1] * len(kernel))
            tensors = {"A": diff, "B": FileTensor.of(eye)}
        else:
            tensors = {"A": FileTensor.of(torch.eye(diff.shape[1], dtype=diff.dtype)), "B": diff}
    else:
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            where = change.tensors["diff_b"].key
            raise SurgeryError("the difference of this bias can't be represented as LoRA", where=where)
        dtype, ones = change.tensors["diff_b"].dtype, [1] * (weight.dim() - 2)
        tensors = {"A": FileTensor.of(torch.zeros(1, *weight.shape[1:], dtype=dtype))}
        tensors["B"] = FileTensor.of(torch.zeros(weight.shape[0], 1, *ones, dtype=dtype))
    if "diff_b" in change.tensors:
        tensors["B_bias"] = change.tensors["diff_b"]
    return Change("lora", tensors, 1.0, tensors["A"].shape[0])


# Methods of LyCORIS ---------------------------------------------------------------------------------------------


def _lokr(change: Change, module: nn.Module | None, assumed: list[str]) -> Change:
    """LoKr as it is, where the rule divides the sizes in the same way; otherwise as LoRA."""
    weight = getattr(module, "weight", None)
    size = tuple(weight.shape) if isinstance(weight, Tensor) else None
    try:
        change.fields = lokr_fields(change, size)
        return change
    except SurgeryError:
        if size is None or "magnitude" in change.tensors:
            raise
    _tell(assumed, "LoKr whose sizes no decompose_factor gives is loaded as LoRA: the product of its thin factors")
    t = {part.removeprefix("lokr_"): tensor.read() for part, tensor in change.tensors.items()}
    first = _thin(t["w1"]) if "w1" in t else (t["w1_a"], t["w1_b"])
    if "w2" in t:
        second = _thin(t["w2"].flatten(1))
    elif "t2" in t:
        second = t["w2_a"].t(), torch.einsum("ij...,jq->iq...", t["t2"], t["w2_b"]).flatten(1)
    else:
        second = t["w2_a"], t["w2_b"]
    B, A = (torch.kron(one.contiguous(), two.contiguous()) for one, two in zip(first, second, strict=True))
    return _low_rank(A, B, size, change.scale)


def _low_rank(A: Tensor, B: Tensor, size: tuple[int, ...], scale: float) -> Change:
    """A LoRA for a weight of a size, from two matrices."""
    if B.shape[0] != size[0] or A.shape[1] != torch.Size(size[1:]).numel():
        raise SurgeryError(f"the change is ({B.shape[0]}, {A.shape[1]}), and the weight of the module is {size}")
    A, B = A.reshape(-1, *size[1:]), B.reshape(*B.shape, *[1] * (len(size) - 2))
    return Change("lora", {"A": FileTensor.of(A), "B": FileTensor.of(B)}, scale, len(A))


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    return (matrix, eye) if matrix.shape[1] <= matrix.shape[0] else (eye, matrix)


def _oft(change: Change, weight: Tensor) -> Tensor:
    """R W - W, with a rotation R of blocks of outputs; the file's alpha bounds the norm of its generator."""
    blocks = change.tensors["oft_blocks"].read()
    butterfly = blocks.dim() == 4  # BOFT: (stages, blocks, size, size)
    count, size, again = blocks.shape[-3:] if blocks.dim() in (3, 4) else (0, 0, 0)
    if count * size != weight.shape[0] or size != again or butterfly and (size % 2 or 2 ** (len(blocks) - 1) > count):
        why = f"their shape is {tuple(blocks.shape)}, and the weight's {tuple(weight.shape)}"
        fix = "load it in LyCORIS, and save what it merges"
        what = "the blocks of this OFT are not square blocks of the outputs"
        raise SurgeryError(what, where=change.key, why=why, fix=fix)
    generator, eye = (blocks - blocks.transpose(-1, -2)).float(), torch.eye(size)
    bound = float(change.tensors["alpha"].read()) * weight.shape[0] if "alpha" in change.tensors else 0.0
    norm = float(generator.norm()) + 1e-8
    if 0 < bound < norm:
        generator = generator * (bound / norm)
    rotation = (eye + generator) @ torch.linalg.inv(eye - generator)
    if butterfly:
        turned = _butterfly(rotation, weight.float())
    else:
        turned = torch.einsum("knm,kn...->km...", rotation, weight.float().unflatten(0, (count, size))).flatten(0, 1)
    if "rescale" in change.tensors:
        turned = turned * change.tensors["rescale"].read().float()
    return (turned - weight.float()).to(blocks.dtype)


def _butterfly(rotations: Tensor, weight: Tensor) -> Tensor:
    """The outputs after all stages of BOFT: stage i turns rows that lie size / 2 · 2**i apart."""
    for stage, rotation in enumerate(rotations):
        size = rotation.shape[-1]
        apart = 2**stage * size // 2
        paired = weight.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        turned = torch.einsum("bij,bj...->bi...", rotation, paired).flatten(0, 1)
        weight = turned.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return weight


def _glora(change: Change, weight: Tensor) -> Change:
    """W a1 a2 + b1 b2 = [W a1, b1] [a2; b2]."""
    t = {name: tensor.read() for name, tensor in change.tensors.items()}
    if weight.dim() != 2 or any(t[name].dim() != 2 for name in ("a1", "a2", "b1", "b2")):
        raise SurgeryError("GLoRA of a convolution can't be represented as LoRA", where=change.key)
    turned = (weight.float() @ t["a1"].float()).to(t["b1"].dtype)
    return _low_rank(torch.cat([t["a2"], t["b2"]]), torch.cat([turned, t["b1"]], 1), tuple(weight.shape), change.scale)
