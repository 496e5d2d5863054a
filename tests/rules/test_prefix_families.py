"""A prefix on every family of `families.py`: it goes on, trains, and comes off to the bit; or is refused with a reason.

A sample by default; all of them with ALL_FAMILIES=1 (`make families`).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from surgery import PlanError, apply_rules, remove
from surgery.rules import PrefixRule
from surgery.testing import Snapshot
from surgery.tracing.example_call import call, equal, random_state
from tests.support.families import FAMILIES
from tests.support.prefix_families import NONE, OTHER

pytest.importorskip("transformers")

SAMPLE = ["deberta_v2", "bloom", "gptj", "mobilebert", "deepseek_v3", "t5", "mvp", "vit", "swinv2", "lxmert", "trocr",
          "openai_gpt", "nystromformer", "mamba", "longformer"]  # fmt: skip
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_comes_and_goes(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    with torch.no_grad():
        model(**inputs)  # some set attributes and hooks at their first call
    random, snapshot = random_state(), Snapshot(model)
    before = call(model, inputs, random)
    if name in NONE or name in OTHER:
        with pytest.raises(PlanError, match=OTHER.get(name, "nothing to do")):
            apply_rules(model, PrefixRule(length=2), example_inputs=inputs)
    else:
        apply_rules(model, PrefixRule(length=2), example_inputs=inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_()
        assert not equal(call(model, inputs, random), before)
        output = model(**inputs)
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        sums = [v.float().square().sum() for v in values if isinstance(v, Tensor) and v.requires_grad]
        if sums and name not in NO_BACKWARD:
            torch.stack(sums).sum().backward()
            assert any(p.grad is not None for p in trained)
        remove(model)
    assert snapshot.differences(model) == [] and equal(call(model, inputs, random), before)


NO_BACKWARD = {"xlstm"}
