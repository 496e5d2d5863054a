"""What a row of docs/reference/engines.md is: adapters, and the steps of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BOTH", "NONE", "A", "AdapterCase", "B", "Step"]

Rules = list[dict[str, Any]]
"""Rules as `Rule.from_dict` takes them."""


@dataclass(frozen=True)
class Step:
    """One state of the program: the adapters that are active, or one adapter's name for each prompt."""

    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"active": list(self.active), "rows": list(self.rows)}


NONE, A, B, BOTH = Step(), Step(("a",)), Step(("b",)), Step(("a", "b"))


@dataclass(frozen=True)
class AdapterCase:
    """One row.

    Args:
        name: the row's title.
        adapters: rules by the adapter's name.
        base: a name of `bases.BASES`.
        steps: what the program does, in this order.
        dtype: the dtype of the adapter's tensors in the file.
        tolerance: a larger one than the program's: float32 sums of many layers differ by more.
        kind: "decoder" (token ids to logits), or the kind of another family of engines.
    """

    name: str
    adapters: Mapping[str, Rules]
    base: str = "llama"
    steps: tuple[Step, ...] = (NONE, A, NONE)
    dtype: str = "float32"
    kind: str = "decoder"
    tolerance: float = 0.0
