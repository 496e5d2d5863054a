"""Stacks of experts in MXFP4, as gpt-oss' checkpoint and transformers' module have them."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import SurgeryError
from surgery.packed.packed_stack import packed_stacks_of
from tests.support.packed_experts import wrapped

mxfp4: Any = pytest.importorskip("transformers.integrations.mxfp4")
transformers: Any = pytest.importorskip("transformers")

EXPERTS, HIDDEN, INTER = 2, 64, 32
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A stack (experts, out, in) as codes and scales, by the text of the OCP specification, one number at a time.

    The scale is the least power of two with which no number of the block is above 6.
    """
    experts, out, inner = weight.shape
    blocks, scales = [], []
    for block in weight.reshape(-1, 32).tolist():
        greatest = max(map(abs, block))
        exponent = max(0, math.frexp(greatest)[1] - 4 + 127) if greatest else 0
        while greatest > 6 * 2.0 ** (exponent - 127):
            exponent += 1
        codes = []
        for number in block:
            share = abs(number) / 2.0 ** (exponent - 127)
            # ties go to the code with a 0 as its last bit
            code = min(range(8), key=lambda code: (abs(LEVELS[code] - share), code % 2))
            codes.append(code | (8 if str(number).startswith("-") else 0))
        blocks.append([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)])
        scales.append(exponent)
    return (
        torch.tensor(blocks, dtype=torch.uint8).view(experts, out, inner // 32, 16),
        torch.tensor(scales, dtype=torch.uint8).view(experts, out, inner // 32),
    )


@functools.cache
def checkpoint(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of random experts."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, (out, inner) in {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}.items():
        weight = torch.randn(EXPERTS, out, inner, generator=generator)
        weight *= torch.exp2(torch.randint(-9, 5, (EXPERTS, out, 1), generator=generator).float())
        made[name] = encode(weight)
    return made


def build(form: str, seed: int = 0) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """Experts with codes and scales, and the codes and scales in the checkpoint's order."""
    config = transformers.GptOssConfig(num_local_experts=EXPERTS, intermediate_size=INTER, hidden_size=HIDDEN)
    module: Any = mxfp4.Mxfp4GptOssExperts(config)
    made = checkpoint(seed)
    for name, (blocks, scales) in made.items():
        delattr(module, name)
        if form == "checkpoint":
            setattr(module, f"{name}_blocks", nn.Parameter(blocks.clone(), requires_grad=False))
            setattr(module, f"{name}_scales", nn.Parameter(scales.clone(), requires_grad=False))
        else:
            setattr(module, name, wrapped(blocks.flatten(2)))
            setattr(module, f"{name}_precision_config", SimpleNamespace(weight_scale=wrapped(scales)))
    return module, made


def in_order(module: Any, name: str, form: str) -> tuple[Tensor, Tensor]:
    """The codes and scales of a module in the checkpoint's order, by transformers' own operation."""
    if form == "checkpoint":
        return getattr(module, f"{name}_blocks"), getattr(module, f"{name}_scales")
    saved = mxfp4.Mxfp4ReverseDeserialize(None).convert({}, nn.ModuleList([module]), f"0.{name}_blocks")
    return saved[f"0.{name}_blocks"], saved[f"0.{name}_scales"]


every_form = pytest.mark.parametrize("form", ["checkpoint", "kernels"])


@every_form
def test_the_dequantised_stack_is_the_one_that_transformers_loads(form: str) -> None:
    module, made = build(form)
    stacks = packed_stacks_of(module)
    assert list(stacks) == ["gate_up_proj", "down_proj"]
    plain = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(
        transformers.GptOssConfig(num_local_experts=EXPERTS, intermediate_size=INTER, hidden_size=HIDDEN)
    )
    for name, stack in stacks.items():
        expected = mxfp4.convert_moe_packed_tensors(*made[name])
        actual = stack.dequantise()
        assert torch.equal(actual, expected) and actual.dtype == stack.dtype == expected.dtype
        assert actual.shape == stack.shape == getattr(plain, name).shape
        assert stack.nbytes * 32 == actual.numel() * 17  # 4 bits each, and 8 for 32
        assert stack.layout == "mxfp4 (e2m1), blocks of 32" and stack.device.type == "cpu"


def test_every_code_and_scale_is_dequantised_as_transformers_does() -> None:
    module, _ = build("checkpoint")
    with torch.no_grad():
        module.down_proj_blocks.copy_(torch.arange(EXPERTS * HIDDEN * 16).view(EXPERTS, HIDDEN, 1, 16) % 256)
        module.down_proj_scales.copy_(torch.arange(EXPERTS * HIDDEN).view(EXPERTS, HIDDEN, 1) * 2)
    expected = mxfp4.convert_moe_packed_tensors(module.down_proj_blocks, module.down_proj_scales)
    actual = packed_stacks_of(module)["down_proj"].dequantise()
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))  # also -0, infinity and small numbers


@every_form
def test_requantising_gives_the_codes_of_the_encoder(form: str) -> None:
    module, made = build(form)
    _, other = build(form, seed=1)
    for name, stack in packed_stacks_of(module).items():
        before = {key: tensor.clone() for key, tensor in stack.tensors().items()}
        objects = list(map(id, stack.tensors().values())) if form == "kernels" else []
        again = stack.requantise(stack.dequantise(), scales="keep")
        assert again.keys() == before.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in before.items())
        assert torch.equal(stack.rounded(stack.dequantise()), stack.dequantise())  # a smaller scale has them, too
        weight = mxfp4.convert_moe_packed_tensors(*other[name], dtype=torch.float32) * 1.37
        new = stack.requantise(weight)
        kept = stack.requantise(weight, scales="keep")
        assert all(torch.equal(stack.tensors()[key], tensor) for key, tensor in before.items())  # nothing changed
        blocks, scales = encode(weight.mT)
        expected = mxfp4.convert_moe_packed_tensors(blocks, scales)
        assert torch.equal(stack.rounded(weight), expected)
        stack.write(new)
        assert all(map(torch.equal, in_order(module, name, form), (blocks, scales)))
        stack.write(kept)
        assert torch.equal(in_order(module, name, form)[1], made[name][1])
        steps = torch.exp2(made[name][1].float() - 127).repeat_interleave(32, -1).mT
        off = (stack.dequantise().float() - weight).abs()
        assert bool((off <= torch.maximum(weight.abs() / 4, steps / 4))[weight.abs() <= 6 * steps].all())
        stack.write(before)
        assert all(map(torch.equal, in_order(module, name, form), made[name]))
        assert not objects or objects == list(map(id, stack.tensors().values()))


def test_ties_zeros_and_the_ends_of_the_range() -> None:
    module, _ = build("checkpoint")
    stack = packed_stacks_of(module)["down_proj"]
    weight = torch.zeros(EXPERTS, INTER, HIDDEN)
    ties = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    weight[0, :8, 0], weight[0, 8:16, 0] = torch.tensor(ties), -torch.tensor(ties)
    weight[1, :3, 0] = torch.tensor([2.0**127, -(2.0**126), 2.0**-120])
    weight[1, :3, 1] = torch.tensor([2.0**-127, -(2.0**-128), 2.0**-140])
    made = stack.requantise(weight)
    assert all(map(torch.equal, made.values(), encode(weight.mT)))
    assert made["down_proj_scales"][0, 1, 0] == 0
    stack.write(made)
    assert stack.dequantise()[0, :8, 0].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]
    for bad in (weight[:1], weight.fill_(torch.nan)):
        with pytest.raises(SurgeryError, match=r"can't be quantised as down_proj[\s\S]*finite numbers"):
            stack.requantise(bad)


def test_copies_have_stacks_of_their_own_and_unloaded_experts_have_none() -> None:
    for form in ("checkpoint", "kernels"):
        module, made = build(form)
        twin = copy.deepcopy(module)
        for stack in packed_stacks_of(twin).values():
            stack.write(stack.requantise(torch.ones(stack.shape)))
        assert all(map(torch.equal, in_order(module, "down_proj", form), made["down_proj"]))
    config = transformers.GptOssConfig(num_local_experts=EXPERTS, intermediate_size=INTER, hidden_size=HIDDEN)
    assert packed_stacks_of(mxfp4.Mxfp4GptOssExperts(config)) == {}
    assert packed_stacks_of(nn.Linear(2, 2)) == {}
