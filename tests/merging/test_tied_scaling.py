"""Models whose forward scales the head's input if its weight is tied: untying must keep the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import SurgeryError, apply_rules, merge, merge_to, unmerge
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES
from tests.support.family_runs import run

pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["umt5", "switch_transformers"])
def test_the_output_keeps_its_scale(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = FAMILIES[family].make().eval()
    inputs = FAMILIES[family].inputs()
    apply_rules(model, [LoraRule("re:lm_head", rank=2, init="random")])
    live, before = run(model, inputs), Snapshot(model)  # a first call may leave notes of its own
    merge(model, untie=True)
    merged = run(model, inputs)
    for output, expected in zip(merged, live, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    model.tie_weights()
    assert all(map(torch.equal, run(model, inputs), merged))
    unmerge(model)
    assert before.differences(model) == []
    with pytest.raises(SurgeryError, match="can't hold untied weights") as caught:
        merge_to(model, tmp_path, untie=True)
    assert "computes something else if tie_word_embeddings is False" in str(caught.value)
    assert before.differences(model) == [] and not list(tmp_path.iterdir())
