"""Runs models of all families, and chooses a rule for each."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.rules import LoraRule

__all__ = ["NOT_REACHED", "NO_LINEAR", "READ_PAST", "rule_for", "run", "tensors"]


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


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of a model's output, without caches."""
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


def rule_for(name: str, model: nn.Module) -> LoraRule:
    if name in NO_LINEAR:
        return LoraRule(NO_LINEAR[name], rank=2)
    left_out = [table[name] for table in (READ_PAST, NOT_REACHED) if name in table]
    paths = [path for path, _ in model.named_modules() if any(re.search(pattern, path) for pattern in left_out)]
    assert bool(paths) == bool(left_out)
    return LoraRule("all-linear", rank=2, exclude=paths)
