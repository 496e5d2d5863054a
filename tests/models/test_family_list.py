"""Every family of `families.py` runs, is adapted on "all-linear", merged and trained; `remove` restores the bits.

A sample by default; all of them with ALL_FAMILIES=1 (`make families`).
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, SurgeryWarning, apply_rules, merge, remove, unmerge
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES, KINDS

pytest.importorskip("transformers")

SAMPLE = ["bert", "gpt_neo", "t5", "qwen3_moe", "mamba2", "segformer", "wavlm", "owlvit", "patchtst", "resnet"]
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else SAMPLE

# Families whose only linear layer is the head, and the targets of their rules.
NO_LINEAR: dict[str, type[nn.Module] | str] = {
    **dict.fromkeys(["resnet", "regnet", "bit", "efficientnet", "poolformer"], nn.Conv2d),
    **dict.fromkeys(["mobilevitv2", "mobilenet_v1", "mobilenet_v2"], nn.Conv2d),
    "encodec": nn.Conv1d,
    "dac": nn.Conv1d,
    "ibert": "classifier.dense",  # its layers are QuantLinear, which is not a Linear; the head has a Linear
}

# Targets of "all-linear" whose weights the family's code reads without calling them: regular expressions.
READ_PAST = {
    "mamba": r"mixer\.dt_proj",
    "falcon_mamba": r"mixer\.dt_proj",  # called only if the weights are quantised
    "jamba": r"mamba\.dt_proj",
    "wavlm": r"attention\.[qkv]_proj|attention\.out_proj",  # F.multi_head_attention_forward
    "layoutlmv3": r"encoder\.rel_pos_([xy]_)?bias",
}

# Targets that the example does not reach: a branch, an expert or an input that it does not use.
NOT_REACHED = {
    "luke": r"entity_|_self\.|attention\.self\.(w2e|e2w|e2e)_query",  # no entities
    "esm": r"contact_head",
    "led": r"_global",  # no global attention
    "switch_transformers": r"experts\.",
    "nllb_moe": r"experts\.",
    "flava": r"^(image|text)_projection",  # of the contrastive head
    "bridgetower": r"text_model\.pooler",
    "trocr": r"encoder_attn\.",  # a decoder by itself
    "markuplm": r"xpath_unitseq2_embeddings",
}

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


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    random.seed(1)
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = list(tensors(model(**inputs)))
    assert outputs
    return outputs


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def rule_for(name: str, model: nn.Module) -> LoraRule:
    if name in NO_LINEAR:
        return LoraRule(NO_LINEAR[name], rank=2)
    left_out = [table[name] for table in (READ_PAST, NOT_REACHED) if name in table]
    paths = [path for path, _ in model.named_modules() if any(re.search(pattern, path) for pattern in left_out)]
    assert bool(paths) == bool(left_out)
    return LoraRule("all-linear", rank=2, exclude=paths)


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
