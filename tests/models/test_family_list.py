"""Every family of `families.py` runs, is adapted on "all-linear", merged and trained; `remove` restores the bits.

A sample by default; all of them with ALL_FAMILIES=1 (`make families`).
"""

from __future__ import annotations

import os
import re
import warnings

import pytest
import torch
from torch import Tensor

from surgery import PlanError, SurgeryWarning, apply_rules, merge, remove, unmerge
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES, KINDS
from tests.support.family_runs import NO_LINEAR, NOT_REACHED, READ_PAST, rule_for, run, tensors

pytest.importorskip("transformers")

SAMPLE = ["bert", "gpt_neo", "t5", "qwen3_moe", "mamba2", "segformer", "wavlm", "owlvit", "patchtst", "resnet"]
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else SAMPLE


# Targets that one branch bypasses, which a warning reports.
ON_ONE_BRANCH = {
    "deberta": {"in_proj"},
    "bloom": {"dense", "dense_4h_to_h"},  # pretraining_tp > 1
    "mamba": {"x_proj", "out_proj"},  # fused kernels
    "mamba2": {"out_proj"},
    "falcon_mamba": {"x_proj", "out_proj"},
    "zamba2": {"out_proj"},
    "bamba": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "rwkv": {"output", "value"},  # 4-bit weights
    "reformer": {"query_key", "value"},
}

# One parameter serves several modules, so merging asks for untie=True.
TIED = {"zamba", "dab_detr", "deformable_detr", "blip"}

# Can't be differentiated in evaluation mode, even without adapters: they change tensors that backward needs.
NO_BACKWARD = {"rwkv", "xlstm", "reformer"}


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", NAMES)
def test_runs_twice_alike(name: str) -> None:
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    output = run(model, inputs)
    assert all(bool(tensor.isfinite().all()) for tensor in output)
    assert same(run(model, inputs), output)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    output, before = run(model, inputs), Snapshot(model)  # in this order: a first call may leave notes of its own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SurgeryWarning)
        apply_rules(model, [rule_for(name, model)], example_inputs=inputs)
    warning_matches = [
        re.match(r"LoraRule at (\S+) is bypassed on one branch", str(warning.message)) for warning in caught
    ]
    assert {match and match[1].rpartition(".")[2] for match in warning_matches} == ON_ONE_BRANCH.get(name, set())

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapters." in path:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    live = run(model, inputs)
    assert not same(live, output)
    if name not in TIED:
        merge(model)
        for actual, expected in zip(run(model, inputs), live, strict=True):
            assert (actual - expected).abs().max() <= 1e-3 * (1e-3 + expected.abs().max())
        unmerge(model)
        assert same(run(model, inputs), live)
    remove(model)
    assert before.differences(model) == []
    assert same(run(model, inputs), output)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_BACKWARD])
def test_only_adapters_learn(name: str) -> None:
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    rule = rule_for(name, model).replace(init="random")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        apply_rules(model, [rule])
    output = [tensor for tensor in tensors(model(**inputs)) if tensor.requires_grad]
    torch.stack([(tensor * torch.randn_like(tensor)).sum() for tensor in output]).sum().backward()
    learned = 0
    for path, parameter in model.named_parameters():
        if ".adapters." not in path:
            assert parameter.grad is None, path
        elif parameter.grad is not None:
            assert parameter.grad.isfinite().all(), path
            learned += bool(parameter.grad.any())
    assert learned


@pytest.mark.parametrize("name", [name for name in NAMES if name in {**NO_LINEAR, **READ_PAST, **NOT_REACHED}])
def test_what_cannot_be_adapted_is_said(name: str) -> None:
    """Each problem of a plain "all-linear" names a module of the tables above, and the model is untouched."""
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    run(model, inputs)
    before = Snapshot(model)
    with pytest.raises(PlanError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        apply_rules(model, [LoraRule("all-linear", rank=2)], example_inputs=inputs)
    assert before.differences(model) == []
    for problem in caught.value.problems:
        if name in NO_LINEAR:
            assert problem.why == "the model has no linear layer beside its output head"
        else:
            table = READ_PAST if problem.what == "LoraRule would be bypassed" else NOT_REACHED
            assert re.search(table[name], problem.where or ""), problem


def test_the_tables_name_families_of_every_kind() -> None:
    assert len(FAMILIES) >= 75
    assert {family.kind for family in FAMILIES.values()} == set(KINDS)
    assert {*NO_LINEAR, *READ_PAST, *NOT_REACHED, *ON_ONE_BRANCH, *TIED, *NO_BACKWARD, *SAMPLE} <= set(FAMILIES)
