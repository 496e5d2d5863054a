"""Errors and guards of traces name the line of the user's own code: its file, number and text."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import TraceError, trace, trace_site
from surgery.transaction.user_frames import ENGINE_FOLDER, is_ours


def helper(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:  # here
            return x
        return -x


class DecidesFurtherIn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x + 1)


class DecidesInTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(F.multi_head_attention_forward(x))  # type: ignore[call-arg]  # here


class SetsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        self.last = y  # here
        return y


class SetsAChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.child.last = x  # type: ignore[assignment]  # here
        return self.child(x)


class MakesATensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0])[int(x[0])]  # here


def line_in(function: Any, text: str) -> str:
    lines, start = inspect.getsourcelines(function)
    at = next(i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{start + at}: {lines[at].strip()}"


@pytest.mark.parametrize(
    "cls, function, text",
    [
        (Decides, Decides.forward, "# here"),
        (DecidesFurtherIn, helper, "x.sum() > 0"),
        (DecidesInTorch, DecidesInTorch.forward, "# here"),
        (SetsItself, SetsItself.forward, "# here"),
        (SetsAChild, SetsAChild.forward, "# here"),
        (MakesATensor, MakesATensor.forward, "# here"),
    ],
)
def test_trace_site_names_the_line(cls: Any, function: Any, text: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace_site(cls())
    assert caught.value.where == line_in(function, text)


@pytest.mark.parametrize("cls, function, text", [(DecidesFurtherIn, helper, "x.sum() > 0")])
def test_trace_names_the_line(cls: Any, function: Any, text: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(cls(), (torch.ones(3),))
    assert caught.value.where == line_in(function, text)


def test_a_graphs_guard_names_the_line_that_decided() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 3 else x  # here

    graph = trace(Long(), (torch.ones(5),))
    where = line_in(Long.forward, "# here").rpartition(": ")[0]
    assert torch.equal(graph(torch.ones(6)), torch.full((6,), 2.0))
    with pytest.raises(Exception, match=where):
        graph(torch.ones(2))


def test_the_engines_own_files_are_known_wherever_they_lie() -> None:
    folder = Path(surgery.__file__).resolve().parent
    assert Path(ENGINE_FOLDER) == folder
    assert all(is_ours(str(path)) for path in folder.rglob("*.py"))
    assert not is_ours(__file__) and not is_ours(str(folder.parent / "surgery_of_mine.py"))
    assert not [path.name for path in folder.rglob("*.py") if "__file__.rpartition" in path.read_text()]
