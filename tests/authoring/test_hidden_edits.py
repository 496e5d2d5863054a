"""A warning names an edit that another live adapter's rule hides, because its adapter would have no effect."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from surgery import Rule, Structure, SurgeryWarning, apply_rules, remove, rule
from surgery.rules import LoraRule


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.sigmoid(self.up(x)))


@rule("test_hidden_double")
class Double(Rule):
    def rewrite(self, site):
        for match in site.find(Structure(lambda x: torch.sigmoid(x))):
            site.replace(match.root, match.root * 2)


@rule("test_hidden_zero")
class Zero(Rule):
    def rewrite(self, site):
        for match in site.find(Structure(lambda x: torch.tanh(x))):
            site.replace(match.root, site.input * 0)


@rule("test_hidden_ablate")
class Ablate(Rule):
    def rewrite(self, site):
        return torch.zeros_like(site.output)


X = torch.linspace(-1, 1, 8).view(2, 4)


def test_an_edit_inside_of_a_replaced_operation_is_told():
    gated = Gated()
    model = apply_rules(nn.Sequential(gated), Double(targets="0"), adapter="a", example_inputs=X)
    with pytest.warns(SurgeryWarning, match=r"Double \[a\] and Zero \[b\] are live on one Gated") as issued_warnings:
        apply_rules(model, Zero(targets="0"), adapter="b", example_inputs=X)
    assert "no effect" in str(issued_warnings[0].message)
    assert torch.equal(model(X), X * 0)
    remove(model, adapter="b")
    assert torch.equal(model(X), torch.tanh(2 * torch.sigmoid(gated.up(X))))


def test_an_output_that_is_replaced_hides_the_adapter_before_it():
    model = apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule(targets="0", rank=2), adapter="a")
    with pytest.warns(SurgeryWarning, match=r"LoraRule \[a\] and Ablate \[b\]"):
        apply_rules(model, Ablate(targets="0"), adapter="b")
        model(X)


def test_edits_that_follow_each_other_are_not_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = apply_rules(nn.Sequential(nn.Linear(4, 4)), Ablate(targets="0"), adapter="a")
        apply_rules(model, LoraRule(targets="0", rank=2), adapter="b")
        model(X)
        apply_rules(model, LoraRule(targets="0", rank=3), adapter="c")
        model.train()(X)
