"""Compares the number of tokens in a model and in an adapter's files, and resizes the model's embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.patterns.embeddings import embeddings_of
from surgery.planning.plan import Plan
from surgery.state.records import model_state
from surgery.storage.stored_adapter import Stored

__all__ = ["other_vocabulary", "resized", "sizes_wanted"]


def sizes_wanted(model: nn.Module, plan: Plan | None, stored: Stored) -> set[int]:
    """Returns the vocabulary sizes in an adapter's files that differ from the model's."""
    sizes, embeddings = set(stored.vocabulary), embeddings_of(model)
    for step in plan.steps if plan is not None else ():
        if not any(step.module is module for module in embeddings):
            continue
        rows = len(step.module.weight)  # type: ignore[arg-type]
        for spec in step.specs:
            try:
                entry = stored.entry(plan, step, spec.name)  # type: ignore[arg-type]
            except Exception:  # a file may have any settings; `locate_tensors` reports this error
                continue
            shape = stored.file.shapes.get(entry.key, ()) if entry is not None else ()
            unequal = [
                (size, stored_size) for size, stored_size in zip(spec.shape, shape, strict=False) if size != stored_size
            ]
            if len(shape) == len(spec.shape) and len(unequal) == 1 and unequal[0][0] == rows:
                sizes.add(unequal[0][1])
    return sizes


def other_vocabulary(model: nn.Module, sizes: Collection[int]) -> SurgeryError:
    """Returns the error for another vocabulary size, with the resize that fixes it."""
    model_size, stored_sizes = _rows(model), " or ".join(map(str, sorted(sizes)))
    can_resize = hasattr(model, "resize_token_embeddings")
    fix = f"model.resize_token_embeddings({stored_sizes}) first, or load_adapter(…, resize=True)"
    return SurgeryError(
        f"the adapter was made with a vocabulary of {stored_sizes} tokens, and this model's has {model_size}",
        why="the embeddings were resized before it was trained, or those of this model were resized",
        fix=fix if can_resize and len(sizes) == 1 else "load it on the model that it was made for",
    )


@contextmanager
def resized(model: Any, size: int) -> Iterator[None]:
    """Resizes the model's embeddings. If the block fails, restores their size."""
    before = _rows(model)
    if model_state(model) is not None:
        what, fix = "load_adapter does not resize a model with adapters", "resize it, or load this adapter first"
        raise SurgeryError(what, why="tensors of the other adapters may have the old size", fix=fix)
    model.resize_token_embeddings(size)
    try:
        yield
    except BaseException:
        model.resize_token_embeddings(before)
        raise


def _rows(model: nn.Module) -> int:
    return next((len(module.weight) for module in embeddings_of(model)), 0)  # type: ignore[arg-type]
