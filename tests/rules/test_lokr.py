"""LokrRule on a Conv1d, where PEFT's LoKr computes something else."""

from __future__ import annotations

import pytest
import torch

from tests.support.method_formulas import lokr
from tests.support.methods import METHODS, example, in_peft, reproduced, theirs_of


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_has_no_kronecker_product_for_a_conv1d() -> None:
    model, x = example("Conv1d")
    method = METHODS["lokr-whole"]
    layer = in_peft(model, method, init_weights=False).base_model.model.m
    params = {key: tensor.detach() for key, tensor in theirs_of(layer, method).items()}
    zero = torch.zeros(12, 8, 3)
    delta = lokr(zero, torch.zeros(12), params, method.rule)[0]
    assert (layer.get_delta_weight("default") - delta).abs().max() > 0.1 * delta.abs().max()
    with pytest.raises(RuntimeError):
        in_peft(model, METHODS["lokr-both"])(x)
