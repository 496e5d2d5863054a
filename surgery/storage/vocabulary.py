"""How many tokens a model's embeddings have, and the model with another number of them."""

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
    """The numbers of tokens that an adapter's files were made with, where they are not the model's."""
    sizes, known = set(stored.vocabulary), embeddings_of(model)
    for step in plan.steps if plan is not None else ():
        if not any(step.module is module for module in known):
            continue
        rows = len(step.module.weight)  # type: ignore[arg-type]
        for spec in step.specs:
            try:
                entry = stored.entry(plan, step, spec.name)  # type: ignore[arg-type]
            except Exception:  # settings of a file may say anything; it is told with the tensors that are not found
                continue
            shape = stored.file.shapes.get(entry.key, ()) if entry is not None else ()
            other = [(size, there) for size, there in zip(spec.shape, shape, strict=False) if size != there]
            if len(shape) == len(spec.shape) and len(other) == 1 and other[0][0] == rows:
                sizes.add(other[0][1])
    return sizes


def other_vocabulary(model: nn.Module, sizes: Collection[int]) -> SurgeryError:
    """The error for files of another number of tokens, with the resize that is needed."""
    here, there = _rows(model), " or ".join(map(str, sorted(sizes)))
    able = hasattr(model, "resize_token_embeddings")
    fix = f"model.resize_token_embeddings({there}) before, or load_adapter(…, resize=True)"
    return SurgeryError(
        f"the adapter was made with a vocabulary of {there} tokens, and this model's has {here}",
        why="the embeddings were resized before it was trained, or are resized here",
        fix=fix if able and len(sizes) == 1 else "load it on the model that it was made for",
    )


@contextmanager
def resized(model: Any, size: int) -> Iterator[None]:
    """The model with this many tokens, as `resize_token_embeddings` makes it; as before, where the block fails."""
    before = _rows(model)
    if model_state(model) is not None:
        what, fix = "a model with adapters is not resized by loading", "resize it, or load this adapter first"
        raise SurgeryError(what, why="the others' tensors may have the sizes of its embeddings", fix=fix)
    model.resize_token_embeddings(size)
    try:
        yield
    except BaseException:
        model.resize_token_embeddings(before)
        raise


def _rows(model: nn.Module) -> int:
    return next((len(module.weight) for module in embeddings_of(model)), 0)  # type: ignore[arg-type]
