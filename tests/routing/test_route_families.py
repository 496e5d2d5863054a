"""Two LoRA adapters and the base in one batch on every model family: each row as if alone, or an error.

Runs a sample of the families by default, and all with ALL_FAMILIES=1 (`make families`).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery import SurgeryError, apply_rules, remove, route, using
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from surgery.tracing.example_call import call, random_state
from tests.support.families import FAMILIES

pytest.importorskip("transformers")

SAMPLE = ["bert", "xlnet", "mixtral", "switch_transformers", "mobilevit", "clip", "swin", "bart", "whisper", "nllb_moe"]
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else [name for name in SAMPLE if name in FAMILIES]

# Families with modules whose input does not have the batch's rows first: `route` raises an error instead of guessing.
REFUSED = set(
    "deberta deberta_v2 sew_d wav2vec2_conformer swinv2 swin2sr "  # positions, the same for all rows
    "xlnet longformer led fsmt dab_detr bridgetower "  # positions first
    "xmod jetmoe switch_transformers nllb_moe "  # only some of the rows or tokens
    "mobilevit x_clip".split()  # with these weights, the rows of the batch do not show
)
# Models that mix rows: autoformer uses delays of other rows, vits pads to the longest row.
MIXED = {"autoformer", "vits"}
ROWS = 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_each_row_as_if_alone_or_refused(name: str) -> None:
    torch.manual_seed(0)
    model, example = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    inputs = repeat_rows(example)
    if inputs == {} or not any(isinstance(value, Tensor) for value in inputs.values()):
        pytest.skip("its example holds no batch")
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        pytest.skip(f"it does not take a batch made of its example: {type(error).__name__}")
    before, random = Snapshot(model), random_state()
    try:
        for adapter, rank in (("a", 2), ("b", 3)):
            apply_rules(model, LoraRule("all-linear", rank=rank, alpha=16, init="random"), adapter=adapter)
    except SurgeryError as error:
        pytest.skip(f"it takes no LoRA on all of its linear layers: {error.what}")
    names: list[str | None] = ["a", None, "b"]
    alone = []
    for adapter_name in names:
        with using(model, adapter_name):
            alone.append(tensors(call(model, inputs, random)))
    if name in REFUSED:
        with route(model, names), pytest.raises(SurgeryError, match="adapters of the rows|adapters are named"):
            model(**inputs)
    elif name not in MIXED:
        with route(model, names):
            routed = tensors(call(model, inputs, random))
        for index, tensor in enumerate(routed):
            if tensor.shape[0] != ROWS or tensor.shape == (ROWS, ROWS):  # CLIP's similarity matrix
                continue
            for row in range(ROWS):
                expected = alone[row][index][row].float()
                size = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
                torch.testing.assert_close(tensor[row].float(), expected, rtol=1e-3, atol=2e-4 * size)
    assert before.differences(remove(model)) == []


def repeat_rows(example: dict[str, Any]) -> dict[str, Any]:
    """A batch of different rows, derived from the example's first row."""
    size = next((len(value) for value in example.values() if isinstance(value, Tensor) and value.dim()), 0)

    def rows(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        many = value[:1].repeat(ROWS, *[1] * (value.dim() - 1))
        if value.is_floating_point():
            return many + torch.randn_like(many) * 0.3
        if value.dtype == torch.long and int(value.max()) > 3:
            return (many + torch.arange(ROWS).view(-1, *[1] * (value.dim() - 1))) % (int(value.max()) + 1)
        return many

    return {name: rows(value) for name, value in example.items()}


def tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.dim()]
