"""Models with parts that torch.jit.script compiled: they stay as they are, and all verbs work beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    SurgeryWarning,
    activate,
    apply_rules,
    draw,
    load_adapter,
    merge,
    remove,
    save_adapter,
    summary,
    unmerge,
)
from surgery.rules import LoraRule

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Scripted(nn.Module):
    """A plain layer between a scripted layer and scripted layers with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: nn.Module = torch.jit.script(nn.Linear(4, 4))
        self.middle = nn.Linear(4, 4)
        self.last: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("format", ["peft", "surgery"])
def test_every_verb_works_beside_scripted_parts(format: str, tmp_path: Path) -> None:
    model, x = Scripted(), torch.randn(3, 4)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_rules(model, LoraRule("middle", rank=2, init="random"))
    model(x)  # in training mode, so that the scripted statistics move under the adapter
    with pytest.warns(SurgeryWarning, match="running statistics of module 'last.1'"):
        save_adapter(model, tmp_path, format=format)  # type: ignore[arg-type]
    model.eval()
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted)  # rounding of one product
    activate(unmerge(model), ())
    activate(model, "default")
    assert torch.equal(model(x), adapted)
    assert summary(model).added == 16 and "Scripted" in draw(model)
    remove(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    load_adapter(model, tmp_path)
    assert summary(model).added == 16


def test_parts_that_are_scripted_are_not_sites() -> None:
    from surgery import plan_rules
    from surgery.patterns.own_entries import own_buffer, own_child, own_parameter

    model = Scripted()
    assert [str(problem.where) for problem in plan_rules(model, LoraRule("first")).problems] == ["first"]
    assert own_parameter(model.first, "weight") is not None and own_parameter(model.first, "other") is None
    norm = own_child(model.last, "1")
    assert norm is not None and own_buffer(norm, "running_mean") is not None and own_child(norm, "0") is None
