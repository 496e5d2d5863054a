"""FSDP1 with `use_orig_params`, on one process: within a call, a module's parameters are views of a flat one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from surgery import Rule, apply_rules
from surgery.rules import BiasRule, LoraRule, NormRule, TrainRule

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
    ),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:When using ``NO_SHARD``"),
]


class Layers(nn.Module):
    """Modules that rules see into, and modules whose own forward runs with other parameters."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.circular = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.recompute = recompute

    def inner(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(self.attention(x, x, x)[0]))
        return self.bilinear(self.circular(x), x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    store: Any = vars(dist)["HashStore"]()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        BiasRule(), TrainRule(["attention", "norm", "linear", "circular", "bilinear"]), NormRule("norm"),
        LoraRule(["attention", "linear", "circular"], rank=2, init="random"),
        LoraRule(["attention", "linear", "circular"], rank=2, init="random", dora=True),
    ],
)  # fmt: skip
def test_calls_use_the_adapter(rule: Rule, recompute: bool) -> None:
    torch.manual_seed(0)
    model = apply_rules(Layers(recompute), [rule])
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(torch.randn_like(tensor) / 4)
    inputs = torch.randn(4, 8, requires_grad=True)
    expected = model(inputs)
    expected.square().sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in trained.items() if tensor.grad is not None}
    assert gradients.keys() == trained.keys()
    for tensor in trained.values():
        tensor.grad = None
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    output = sharded(inputs)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for name, tensor in sharded.module.named_parameters():
        if name in gradients:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, gradients[name])
