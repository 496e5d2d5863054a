"""OftRule on a convolution, where PEFT's OFT changes the output."""

from __future__ import annotations

import pytest
import torch

from surgery import apply_rules
from tests.support.methods import METHODS, example, in_peft, reproduced


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_changes_a_convolution_by_an_oft_that_does_nothing() -> None:
    model, x = example("Conv2d")
    plain = model(x)
    assert (in_peft(model, METHODS["oft"])(x) - plain).abs().max() > 0.5
    assert torch.equal(apply_rules(model, [METHODS["oft"].rule], example_inputs=x)(x), plain)
