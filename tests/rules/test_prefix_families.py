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

pytest.importorskip("transformers")

SAMPLE = ["deberta_v2", "bloom", "gptj", "mobilebert", "deepseek_v3", "t5", "mvp", "vit", "swinv2", "lxmert", "trocr",
          "openai_gpt", "nystromformer", "mamba", "longformer"]  # fmt: skip
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else SAMPLE

# Without attention of the form softmax(q kᵀ) v by itself, or hidden in a function of torch's.
NONE = set(
    "fnet squeezebert yoso mra mamba mamba2 falcon_mamba rwkv xlstm convnext convnextv2 resnet regnet bit focalnet "
    "mobilevitv2 mobilenet_v1 mobilenet_v2 efficientnet poolformer upernet wavlm sew_d encodec dac autoformer "
    "patchtsmixer reformer".split()
)
# With an attention of another form, and why it is refused.
OTHER = {
    "xlnet": "no products of a softmax",  # einsum
    "funnel": "no products of a softmax",
    "longformer": "no products of queries",  # in pieces
    "big_bird_sparse": "4 products",
    "nystromformer": "8 products",
    "ibert": "no products of a softmax",  # integers
    "openai_gpt": "a number for each key",
    "longt5": "no products of a softmax",
    "pegasus_x": "no products of a softmax",
    "led": "no products of a softmax",
    "prophetnet": "no products of a softmax",
    "fsmt": "batch and heads",  # time first
    "vitdet": "batch and heads",
    "cvt": "no products of a softmax",
    "swiftformer": "no products of a softmax",
    "groupvit": "no products of a softmax",
    "lilt": "2 products",
    "informer": "batch and heads",
}


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
