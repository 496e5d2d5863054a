"""PEFT's OFT beside this library's, for the tests of OFT on convolutions and on embeddings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.peers import peft

__all__ = ["FIELDS", "assert_same", "in_peft", "train"]

FIELDS: dict[str, dict[str, Any]] = {
    "blocks of a size": {"oft_block_size": 4},
    "a number of blocks": {"oft_block_size": 0, "r": 2},
    "the nearest divisor": {"oft_block_size": 5},
    "shared": {"oft_block_size": 4, "block_share": True},
    "the inverse": {"oft_block_size": 4, "use_cayley_neumann": False},
    "few terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 2},
    "bounded": {"oft_block_size": 4, "coft": True, "eps": 0.1},
}


def in_peft(model: nn.Module, inputs: Tensor, targets: list[str], fields: dict[str, Any]) -> Any:
    """A copy of the model with PEFT's OFT, whose numbers are drawn."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(target_modules=targets, **fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        theirs(inputs)  # with coft, PEFT writes what it bounds into the parameter; ours stays, and later steps differ
    return theirs


def assert_same(actual: Tensor, expected: Tensor) -> None:
    slack = 2e-2 if expected.dtype == torch.bfloat16 else 5e-6  # some roundings; sums in another order
    torch.testing.assert_close(actual, expected, rtol=slack, atol=slack)


def train(model: Any, inputs: Tensor) -> None:
    """One step of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
