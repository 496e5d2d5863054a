"""LoftQ: a start of A and B that takes the error of a quantised weight in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from surgery import PackedWeight, SurgeryError

__all__ = ["fill", "original_weight", "why_not"]


def why_not(folder: str, path: str, shape: tuple[int, int]) -> str | None:
    """Returns why the folder does not give the weight of a site, or None. Reads headers alone."""
    try:
        file, name = _find(folder, path)
        found = _shape(file, name)
    except SurgeryError as error:
        return f"{error.what}: {error.why}"
    return None if found == shape else f"{name} in {folder} has the sizes {found}, and its weight {shape}"


def original_weight(folder: str, path: str) -> Tensor:
    """The weight of a site before it was quantised, in float32."""
    from safetensors import safe_open

    file, name = _find(folder, path)
    with safe_open(str(file), framework="pt") as opened:
        return opened.get_tensor(name).float()


def fill(packed: PackedWeight, original: Tensor, A: Tensor, B: Tensor, scale: float, steps: int) -> Tensor | None:
    """Fills A and B, so that Q + scale · B A is near the original weight W.

    The first step takes Q as it is: B A is the best approximation of W - Q of its rank. Each further step quantises
    W - scale · B A anew, and approximates the rest. A step counts only if ‖W - (Q + scale · B A)‖ falls.

    Returns:
        The values to quantise in the weight's place; None if Q stays as it is.
    """
    original, rank = original.to(packed.device), A.shape[0]
    left, right, error = _best(original - packed.dequantise().float(), rank)
    wanted: Tensor | None = None
    for _ in range(steps - 1):
        target = original - left @ right
        further = _best(original - packed.rounded(target).float(), rank)
        if not further[2] < error:
            break
        (left, right, error), wanted = further, target
    B.copy_(left / scale**0.5)
    A.copy_(right / scale**0.5)
    return wanted


def _best(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of the best approximation of this rank, with equal norms, and the norm of what is left."""
    u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank], float(s[rank:].norm())


def _find(folder: str, path: str) -> tuple[Path, str]:
    """The file and the name of a site's weight. Names may have a prefix more or less than the model's."""
    names = _names(Path(folder))
    wanted = f"{path}.weight".lstrip(".")
    matching = [name for name in names if name == wanted]
    matching = matching or [n for n in names if n.endswith(f".{wanted}") or (wanted.endswith(f".{n}") and "." in n)]
    if len(matching) != 1:
        why = f"{len(matching)} of its {len(names)} tensors fit: {', '.join(matching[:3]) or 'none'}"
        raise SurgeryError(f"{folder} has no single tensor {wanted}", why=why)
    return names[matching[0]], matching[0]


def _names(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in listed.items()}
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(str(file), framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    if not names:
        raise SurgeryError("there are no weights for init='loftq'", why=f"{folder} has no safetensors files")
    return names


def _shape(file: Path, name: str) -> tuple[int, ...]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return tuple(opened.get_slice(name).get_shape())
