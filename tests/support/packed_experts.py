"""Models of transformers whose experts are packed, beside the same models with the numbers that transformers reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["EXPERT_MODELS", "LAYOUTS", "ExpertModel", "Swizzled", "wrapped"]

HIDDEN, INTER, EXPERTS = 64, 32, 4


@dataclass(frozen=True)
class ExpertModel:
    """A layout of packed experts: `build` gives the packed model, and the same with plain experts."""

    name: str
    title: str
    build: Callable[[], tuple[Any, Any]]

    def __str__(self) -> str:
        return self.name


class Swizzled:
    """Stands in for a layout of the triton kernels: it stores rows in the opposite order."""

    def swizzle_data(self, data: Tensor) -> Tensor:
        return data.flip(1).contiguous()

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data.flip(1)


def wrapped(data: Tensor) -> Any:
    layout = Swizzled()
    return SimpleNamespace(storage=SimpleNamespace(layout=layout, data=layout.swizzle_data(data.mT)))


def _library(name: str) -> Any:
    return importlib.import_module(f"transformers{name}")


def _small(config: str, **settings: Any) -> Any:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    made = getattr(_library(""), config)(vocab_size=48, head_dim=32, pad_token_id=0, **sizes, **settings)
    made._attn_implementation = made._experts_implementation = "eager"
    return made


def _model(cls: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(_library(""), cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def _gpt_oss(kernels: bool) -> tuple[Any, Any]:
    """gpt-oss with `Mxfp4GptOssMLP`, as transformers' `replace_with_mxfp4_linear` puts it in, and plain."""
    mxfp4, settings = _library(".integrations.mxfp4"), {"intermediate_size": INTER, "num_experts_per_tok": 2}
    config = _small("GptOssConfig", num_local_experts=EXPERTS, **settings)
    plain, packed = _model("GptOssForCausalLM", config), _model("GptOssForCausalLM", config)
    generator = torch.Generator().manual_seed(3)
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        experts = mxfp4.Mxfp4GptOssExperts(config)
        experts.load_state_dict({n: p for n, p in layer.mlp.experts.state_dict().items() if "bias" in n}, strict=False)
        for name, (out, inner) in {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}.items():
            sizes = (EXPERTS, out, inner // 32)
            blocks = torch.randint(256, (*sizes, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 126, sizes, dtype=torch.uint8, generator=generator)
            getattr(other.mlp.experts, name).copy_(mxfp4.convert_moe_packed_tensors(blocks, scales))
            delattr(experts, name)
            if kernels:
                setattr(experts, name, wrapped(blocks.flatten(2)))
                setattr(experts, f"{name}_precision_config", SimpleNamespace(weight_scale=wrapped(scales)))
            else:
                setattr(experts, f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
                setattr(experts, f"{name}_scales", nn.Parameter(scales, requires_grad=False))
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, experts).eval()
    return packed, plain


def _fp8(block: tuple[int, int] | None, scale: str = "float", codes: str = "fp8") -> tuple[Any, Any]:
    """Qwen3-MoE with `FP8Experts`, as transformers' `replace_with_fp8_linear` puts them in, and plain."""
    fp8 = _library(".integrations.finegrained_fp8")
    config = _small("Qwen3MoeConfig", moe_intermediate_size=INTER, num_experts=EXPERTS, num_experts_per_tok=2)
    plain, packed = _model("Qwen3MoeForCausalLM", config), _model("Qwen3MoeForCausalLM", config)
    settings = _library("").FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale)
    settings.expert_dtype = codes
    linears = [name for name, module in packed.named_modules() if isinstance(module, nn.Linear)]
    fp8.replace_with_fp8_linear(packed, [*linears, *_routers(packed)], settings)
    for layer in packed.model.layers:
        layer.mlp.experts.to_empty(device="cpu")
    quantiser = SimpleNamespace(quantization_config=settings)
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight, stored = getattr(other.mlp.experts, name), dict(layer.mlp.experts.named_parameters())
            if codes == "fp4":
                generator = torch.Generator().manual_seed(4)
                stored[name] = torch.randint(-128, 128, stored[name].shape, dtype=torch.int8, generator=generator)
                scales = torch.exp2(torch.randint(-6, -3, stored[f"{name}_scale_inv"].shape, generator=generator))
                stored[f"{name}_scale_inv"] = scales.to(stored[f"{name}_scale_inv"].dtype)
            else:
                stored |= fp8.Fp8Quantize(quantiser).convert({name: weight})
                if block is None:
                    stored |= _by_halves(fp8, quantiser, name, weight)
            for key in (name, f"{name}_scale_inv"):
                setattr(layer.mlp.experts, key, nn.Parameter(stored[key], requires_grad=False))
            numbers = fp8.Fp8Dequantize(quantiser)._dequantize_one(
                stored[name], stored[f"{name}_scale_inv"], torch.float32
            )
            setattr(other.mlp.experts, name, nn.Parameter(numbers, requires_grad=False))
    return packed.eval(), plain


def _by_halves(fp8: Any, quantiser: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Codes of experts that were quantised one matrix at a time (gate and up apart), with one scale for each."""
    made = [
        fp8.Fp8Quantize(quantiser).convert({name: part}) for part in weight.chunk(2 if name == "gate_up_proj" else 1, 1)
    ]
    scales = torch.cat([part[f"{name}_scale_inv"].view(EXPERTS, 1, 1) for part in made], 1)
    codes = torch.cat([part[name].view(torch.int8) for part in made], 1).view(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def _routers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("gate")]


def _llama4() -> tuple[Any, Any]:
    """Llama 4 with `FbgemmFp8Llama4TextExperts`, and plain."""
    fbgemm = _library(".integrations.fbgemm_fp8")
    settings = {"intermediate_size": INTER, "intermediate_size_mlp": INTER, "num_local_experts": EXPERTS}
    config = _small("Llama4TextConfig", num_experts_per_tok=1, **settings)
    plain, packed = _model("Llama4ForCausalLM", config), _model("Llama4ForCausalLM", config)
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        experts = fbgemm.FbgemmFp8Llama4TextExperts(config).requires_grad_(False)
        for name in ("gate_up_proj", "down_proj"):
            rows = getattr(other.feed_forward.experts, name).mT  # (experts, out, in): a scale for each output
            scales = rows.abs().amax(-1, keepdim=True) / 448
            codes = (rows / scales).to(torch.float8_e4m3fn)
            getattr(other.feed_forward.experts, name).copy_((codes.float() * scales).mT)
            getattr(experts, name).copy_(codes.mT)
            getattr(experts, f"{name}_scale").copy_(scales.mT if name == "gate_up_proj" else scales)
        layer.feed_forward.experts = experts.eval()
    return packed, plain


def _torchao(config: Callable[[Any], Any]) -> Callable[[], tuple[Any, Any]]:
    """Qwen3-MoE with stacks that torchao quantised, and plain."""

    def build() -> tuple[Any, Any]:
        quantization = importlib.import_module("torchao.quantization")
        settings = {"moe_intermediate_size": INTER, "num_experts": EXPERTS, "num_experts_per_tok": 2}
        plain, packed = (_model("Qwen3MoeForCausalLM", _small("Qwen3MoeConfig", **settings)) for _ in range(2))
        stacks = [name for name, parameter in packed.named_parameters() if parameter.dim() == 3]
        chosen = quantization.FqnToConfig({name: config(quantization) for name in stacks})
        quantization.quantize_(packed, chosen, filter_fn=None)
        for name in stacks:
            plain.get_parameter(name).copy_(packed.get_parameter(name).dequantize())
        return packed, plain

    return build


EXPERT_MODELS = [
    ExpertModel("mxfp4", "gpt-oss, `Mxfp4GptOssExperts`", lambda: _gpt_oss(False)),
    ExpertModel("mxfp4 of the kernels", "the same, as the triton kernels store it", lambda: _gpt_oss(True)),
    ExpertModel("fp8, blocks", "Qwen3-MoE, `FP8Experts`, blocks of 16 × 32", lambda: _fp8((16, 32))),
    ExpertModel("fp8, one scale", "`FP8Experts`, one scale for each matrix", lambda: _fp8(None)),
    ExpertModel("fp8, powers of two", "`FP8Experts`, scales e8m0", lambda: _fp8((32, 32), "ue8m0")),
    ExpertModel("fp4", "`FP8Experts` of 4-bit floats", lambda: _fp8((32, 32), "ue8m0", "fp4")),
    ExpertModel("fbgemm llama4", "Llama 4, `FbgemmFp8Llama4TextExperts`", _llama4),
    ExpertModel(
        "torchao int8",
        "Qwen3-MoE, torchao int8",
        _torchao(lambda quantization: quantization.Int8WeightOnlyConfig()),
    ),
    ExpertModel(
        "torchao float8",
        "Qwen3-MoE, torchao float8",
        _torchao(lambda quantization: quantization.Float8WeightOnlyConfig()),
    ),
]
# One of each file that reads them; the rest run in `make slow`, and all in `make quantised`.
_FEW = ("mxfp4 of the kernels", "fp8, blocks", "torchao int8")
LAYOUTS = [
    pytest.param(case, id=case.name, marks=() if case.name in _FEW else pytest.mark.slow(f"as {', '.join(_FEW)}"))
    for case in EXPERT_MODELS
]
