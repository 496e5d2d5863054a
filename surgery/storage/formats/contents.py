"""The intermediate form of an adapter, between all formats: changes by component and module path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.storage.formats.file_tensor import FileTensor

__all__ = ["BaseFacts", "Change", "Contents"]


@dataclass
class Change:
    """The change of one module: W + scale · (what its kind computes from the tensors).

    `kind`: one of `table.KINDS`. `tensors`: by part, as PEFT has them: A (rank, in), B (out, rank). `embedding`: the
    module is a table of embeddings. `fields`: PEFT's fields that the tensors show together with the model's module.
    """

    kind: str
    tensors: dict[str, FileTensor]
    scale: float = 1.0
    rank: int = 0
    embedding: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A key of the file, for messages."""
        return next((tensor.key for tensor in self.tensors.values() if tensor.key), "")


@dataclass
class Contents:
    """An adapter as read from a file: component → module path → change.

    `settings`: what belongs to the adapter as a whole: "dropout", "base", "task", "invocation". `assumed`: facts that
    the file does not state; `assumed_of`: those of one component. `notes`: what a conversion changed in form.
    """

    changes: dict[str, dict[str, Change]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    assumed_of: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def all_assumed(self) -> list[str]:
        return [*self.assumed, *(text for texts in self.assumed_of.values() for text in texts)]

    def each(self) -> Iterator[tuple[str, str, Change]]:
        for component, changes in self.changes.items():
            for path, change in changes.items():
                yield component, path, change


@dataclass(frozen=True)
class BaseFacts:
    """What is known of the base: the paths of its modules, its configuration, and the kinds of its modules.

    `paths`: None if they are not known. `is_embedding`: whether the module at a path is a table of embeddings; None if
    that is not known. `parts`: the facts of the components, where the base is a pipeline's models in one module.
    """

    paths: Collection[str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    is_embedding: Callable[[str], bool] | None = None
    kind: str = ""  # the class of the model
    parts: Mapping[str, BaseFacts] = field(default_factory=dict)

    def of(self, component: str) -> BaseFacts:
        return self.parts.get(component, self)
