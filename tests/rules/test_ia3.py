"""IA3Rule: which modules are feedforward, against PEFT."""

from __future__ import annotations

import copy

import pytest
import torch

from surgery import apply_rules, summary
from surgery.rules import IA3Rule
from tests.support.methods import assert_close, needs_peft, peft


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_feedforward_modules_are_those_of_peft() -> None:
    from tests.support import tiny

    model, inputs = tiny.bert()
    targets, fed = ["key", "value", "output.dense"], ["re:.*layer.1.output.dense", "attention.output.dense"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=r".*(layer.1|attention).output.dense")
    theirs = peft.get_peft_model(copy.deepcopy(model.eval()), config)
    ours = apply_rules(model, [IA3Rule(targets, feedforward=fed)])
    assert summary(ours).trainable == theirs.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "ia3_l" in path:
                site = path.removeprefix("base_model.model.").removesuffix(".ia3_l.default")
                mine = ours.get_parameter(f"{site}.adapters.default.scale")
                parameter.add_(torch.randn_like(parameter) * 0.3)
                mine.copy_(parameter.flatten())
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
