"""compressed-tensors, where the package is installed: compressed Linears, and checkpoints that transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, apply_rules, merge, packed_weight_of, remove, unmerge
from surgery.rules import LoraRule
from surgery.testing import Snapshot

Load = Callable[[str], ModuleType]
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"packed int{bits} {'symmetric' if symmetric else 'asymmetric'}": (
            {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric},
            "pack-quantized",
        )
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "packed rows": ({"num_bits": 4, "type": "int", "strategy": "channel"}, "pack-quantized"),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
    "int8 asymmetric": ({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, "int-quantized"),
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"),
    "fp8 one scale": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "float-quantized"),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def quantised(optional: Load, model: nn.Module, settings: dict[str, Any], kind: str, **more: Any) -> Any:
    """The model with scales from the least and greatest weights, not yet compressed."""
    quantization: Any = optional("compressed_tensors.quantization")
    parts = quantization.QuantizationArgs(**settings)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=parts, **more)
    config = quantization.QuantizationConfig(
        config_groups={"group": scheme}, ignore=["lm_head"], quantization_status="frozen", format=kind
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight: Tensor = module.weight.data  # type: ignore[assignment]
            groups = weight.unflatten(1, (-1, settings.get("group_size", weight.shape[1])))
            if settings["strategy"] == "tensor":
                groups = weight.view(1, 1, -1)
            found = optional("compressed_tensors.quantization.utils").calculate_qparams(
                groups.amin(-1), groups.amax(-1), parts
            )
            for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
                if hasattr(module, name):
                    parameter = getattr(module, name)
                    parameter.data.copy_(value.reshape(parameter.shape))
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    return model


@every_scheme
def test_the_weight_is_what_the_layer_gets_when_it_is_decompressed(scheme: Any, optional: Load) -> None:
    compressors: Any = optional("compressed_tensors.compressors")
    torch.manual_seed(0)
    model = quantised(optional, nn.Sequential(nn.Linear(64, 32)), *scheme)
    assert packed_weight_of(model[0]) is None  # its weight is an ordinary tensor still
    compressors.compress_module(model[0], scheme[1])
    packed = packed_weight_of(model[0])
    assert packed is not None and packed.shape == (32, 64) and scheme[1] in packed.layout
    actual = packed.dequantise()
    twin = copy.deepcopy(model[0])
    compressors.decompress_module(twin)
    assert torch.equal(actual, twin.weight) and actual.dtype == packed.dtype

    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(actual, scales="keep")
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name].view(torch.uint8), again[name].view(torch.uint8)) for name in before)
    torch.manual_seed(1)
    weight = nn.Linear(64, 32).weight.detach()
    packed.write(packed.requantise(weight))
    other: Any = nn.Sequential(nn.Linear(64, 32))
    other[0].weight.data.copy_(weight)
    compressors.compress_module(quantised(optional, other, *scheme)[0], scheme[1])
    assert torch.equal(packed.dequantise(), packed_weight_of(other[0]).dequantise())  # type: ignore[union-attr]


def checkpoint(name: str, optional: Load, folder: Path) -> Any:
    """Writes a quantised Llama. Returns transformers."""
    compressors: Any = optional("compressed_tensors.compressors")
    transformers: Any = optional("transformers")
    settings, kind = SCHEMES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    model = quantised(optional, transformers.LlamaForCausalLM(config), settings, kind)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return transformers


@pytest.mark.parametrize("name", ["packed int4 symmetric", "int8", "fp8"])
@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
def test_adapters_on_a_checkpoint_that_transformers_loads(
    name: str, called: bool, optional: Load, tmp_path: Path
) -> None:
    transformers = checkpoint(name, optional, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    if called:
        loaded(ids)
    projection = loaded.model.layers[0].self_attn.q_proj
    assert (packed_weight_of(projection) is None) == called
    apply_rules(loaded, LoraRule("all-linear", rank=4, init="random"))
    with torch.no_grad():
        live, params = loaded(ids).logits, projection.adapters.default
        x = torch.randn(3, 64)
        torch.testing.assert_close(projection(x), x @ (projection.weight + 2 * params.B @ params.A).t())
        merge(loaded)
        torch.testing.assert_close(loaded(ids).logits, live, rtol=1e-3, atol=1e-3)
        remove(unmerge(loaded))
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", ["packed int4 symmetric", "fp8"])
def test_merging_before_the_first_call_makes_plain_linears(name: str, optional: Load, tmp_path: Path) -> None:
    transformers = checkpoint(name, optional, tmp_path)
    live, merged = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for model in (live, merged):
        torch.manual_seed(1)
        apply_rules(model, LoraRule("all-linear", rank=4, init="random"))
    merge(merged, quantised="dequantise")
    projection = merged.model.layers[0].self_attn.q_proj
    assert type(projection).forward is nn.Linear.forward and not hasattr(projection, "quantization_scheme")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=1e-3, atol=1e-3)

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = packed_weight_of(merged.model.layers[0].self_attn.q_proj)
    assert layer is not None
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    apply_rules(merged, LoraRule("all-linear", rank=4, init="random"))
    merge(merged, quantised="dequantise")
    remove(unmerge(merged))
    assert all(
        torch.equal(before[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in layer.tensors().items()
    )
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(merged(ids).logits, plain(ids).logits)


def test_rounded_inputs_are_refused_with_the_way(optional: Load) -> None:
    quantization: Any = optional("compressed_tensors.quantization")
    inputs = quantization.QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
    model = quantised(optional, nn.Sequential(nn.Linear(64, 32)), *SCHEMES["int8"], input_activations=inputs)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"rounds its input[\s\S]*dequantize=True"):
        apply_rules(model, LoraRule("all-linear", rank=4))
    assert before.differences(model) == []
