"""One scale, one alpha or no scale for all modules. What can't be said so is multiplied into B."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from surgery.errors import SurgeryError
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.scale_values import Written, alpha_of, multiply, number, ranks_and_alphas

__all__ = [
    "fold_to_one_alpha", "one_rank", "read_nothing", "read_one_alpha", "read_one_scale", "write_nothing",
    "write_one_alpha", "write_one_scale",
]  # fmt: skip


def read_one_scale(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    fields = settings.get("lora_parameters") if isinstance(settings, Mapping) else None
    if not isinstance(fields, Mapping) or "scale" not in fields:
        why = "the settings file is absent" if settings is None else "it has no lora_parameters with a scale"
        raise SurgeryError("the scale is not known", why=why, fix="put adapter_config.json beside the tensors")
    scale = number(fields["scale"], "the settings' scale")
    for _, _, change in contents.each():
        change.scale = scale
    if isinstance(dropout := fields.get("dropout"), (int, float)) and 0 < dropout < 1:
        contents.settings["dropout"] = float(dropout)
    kind = str(settings.get("fine_tune_type", "lora"))
    stored = {"dora" if "magnitude" in change.tensors else "lora" for _, _, change in contents.each()}
    if stored != {kind}:
        why = f"fine_tune_type={kind[:40]!r}, and the tensors are those of {' and '.join(sorted(stored))}"
        raise SurgeryError("the settings and the tensors differ in the method", why=why)


def write_one_scale(contents: Contents, written: Written) -> None:
    scale = _fold(contents, written, "one scale", lambda change: change.scale, lambda value, change: value)
    rank = one_rank(contents)
    kinds = {"dora" if "magnitude" in change.tensors else "lora" for _, _, change in contents.each()}
    if len(kinds) > 1:
        raise SurgeryError("the format holds LoRA or DoRA, and the adapter has both", fix="choose another format")
    paths = [path for _, path, _ in contents.each()]
    layers = {hit[1] for path in paths if (hit := re.search(r"\.(\d+)\.", path))}
    written.values |= {"scale": scale, "rank": rank, "kind": kinds.pop(), "paths": paths, "layers": len(layers)}
    written.values["dropout"] = contents.settings.get("dropout", 0.0)


def one_rank(contents: Contents) -> int:
    """The rank of all changes. `SurgeryError` if there are several."""
    ranks, _ = ranks_and_alphas(contents)
    if len(ranks) > 1:
        raise SurgeryError(
            f"the format has one rank for all modules, and the adapter has {', '.join(map(str, sorted(ranks)))}",
            fix="train with one rank, or choose another format",
        )
    return ranks[0]


def read_one_alpha(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if "adapter.lora.alpha" not in header:
        raise SurgeryError("the file does not say alpha", why="it has no field adapter.lora.alpha")
    value = header["adapter.lora.alpha"]
    if float(value) == 0:  # llama.cpp then does not divide by the rank
        contents.assumed.append("the file's alpha is 0, which llama.cpp reads as a scale of 1")
    alpha = number(value, "adapter.lora.alpha") if float(value) else None
    for _, _, change in contents.each():
        change.scale = 1.0 if alpha is None else alpha / change.rank
    if tokens := header.get("adapter.alora.invocation_tokens"):
        contents.settings["invocation"] = [int(token) for token in tokens]


def fold_to_one_alpha(contents: Contents, written: Written) -> float:
    """The most frequent alpha; what is left of other scales is multiplied into B."""
    return _fold(
        contents,
        written,
        "one alpha",
        lambda change: alpha_of(change.scale, change.rank),
        lambda v, change: v / change.rank,
    )


def write_one_alpha(contents: Contents, written: Written) -> None:
    alpha = fold_to_one_alpha(contents, written)
    rounded = torch.tensor(alpha, dtype=torch.float32).item()
    if rounded != alpha:
        written.notes.append(f"alpha {alpha!r} is rounded to float32, {rounded!r}")
    written.header["adapter.lora.alpha"] = rounded
    if tokens := contents.settings.get("invocation"):
        written.header["adapter.alora.invocation_tokens"] = list(tokens)


def write_nothing(contents: Contents, written: Written) -> None:
    _fold(contents, written, "no scale", lambda change: 1.0, lambda value, change: 1.0)


def read_nothing(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    contents.assumed.append("the format does not have a scale: it is 1")


def _fold(
    contents: Contents,
    written: Written,
    has: str,
    said: Callable[[Change], float],
    scale_for: Callable[[float, Change], float],
) -> float:
    """The number that is said; B of changes with another scale is multiplied by what is left."""
    common = Counter(said(change) for _, _, change in contents.each()).most_common(1)[0][0]
    folded: list[str] = []
    for _, path, change in contents.each():
        rest = change.scale / scale_for(common, change)
        if rest == 1:
            continue
        if change.kind != "lora":
            raise SurgeryError(f"the format has {has}, and this change another scale", where=path)
        change.tensors["B"] = change.tensors["B"].convert(lambda B, rest=rest: multiply(B, rest))
        change.scale = scale_for(common, change)
        folded.append(path)
    if folded:
        written.notes.append(
            f"the format has {has}: the scale of {len(folded)} modules, such as {folded[0]}, is multiplied into B"
        )
    return common
