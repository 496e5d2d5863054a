"""gptqmodel's layers: a stand-in for the rearranged ones, and the layers themselves where the package is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_rules, packed_weight_of, remove
from surgery.errors import SurgeryWarning
from surgery.rules import LoraRule
from tests.support.packed_layers import QuantLinear, TorchAtenLinear, TorchLinear, WQLinear_GEMM

Load = Callable[[str], ModuleType]
LORA = LoraRule("all-linear", rank=4, alpha=6, init="random")
UNIT = torch.eye(128, dtype=torch.float16)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64)


def order() -> torch.Tensor:
    return torch.randperm(128, generator=torch.Generator().manual_seed(1))


def check(module: Any) -> None:
    """Reading, writing and LoRA on a layer, against the layer's own forward."""
    packed, bias = packed_weight_of(module), module.bias
    assert packed is not None and packed.shape == (64, 128)
    module.bias = None
    with torch.no_grad():
        assert torch.equal(packed.dequantise(), module(UNIT).t())
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    again = packed.requantise(packed.dequantise(), scales="keep")
    assert all(torch.equal(before[name], again[name]) for name in before)
    weight = torch.randn(64, 128)
    packed.write(packed.requantise(weight))
    with torch.no_grad():
        assert torch.equal(packed.dequantise(), module(UNIT).t())
    module.bias = bias
    model: Any = nn.Sequential(module)
    apply_rules(model, LORA)
    params, x = model[0].adapters.default, torch.randn(3, 128, dtype=torch.float16)
    expected = x.float() @ (packed.dequantise().float() + 1.5 * params.B @ params.A).t() + bias.float()
    actual = model(x).float()
    assert (actual - expected).norm() < 5e-3 * expected.norm()  # sums in float16
    actual.sum().backward()
    assert params.A.grad is not None and params.B.grad is not None
    remove(model)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rearranged_codes_are_read_and_written(shuffled: bool) -> None:
    module = TorchAtenLinear(linear(), order=order() if shuffled else None)
    packed = packed_weight_of(module)
    assert packed is not None and packed.backend == "gptqmodel-aten" and not packed.passes_gradient
    torch.testing.assert_close(packed.dequantise().float(), module.reference(), rtol=1e-3, atol=1e-4)
    with pytest.warns(SurgeryWarning, match="no gradient passes through the kernels of 0"):
        check(module)


# Real layers -------------------------------------------------------------------------------------------------


def real(optional: Load, kind: str, cls: str, **settings: Any) -> Any:
    made: Any = getattr(optional(f"gptqmodel.nn_modules.qlinear.{kind}"), cls)
    base = {"group_size": 32, "sym": False, "in_features": 128, "out_features": 64, "bias": True, "desc_act": True}
    return made(**base | {"register_buffers": True} | settings)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, shuffled: bool, optional: Load) -> None:
    module = real(optional, "torch", "TorchLinear", bits=bits)
    stand_in = TorchLinear(linear(), bits=bits, group_size=32, order=order() if shuffled else None)
    module.load_state_dict(stand_in.state_dict(), strict=False)
    module._init_wf_unsqueeze_buffers()
    assert torch.equal(packed_weight_of(module).dequantise(), stand_in.reference())  # type: ignore[union-attr]
    check(module)


@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_on_a_cpu(shuffled: bool, optional: Load) -> None:
    module = real(optional, "torch_aten_kernel", "TorchAtenLinear", bits=4).eval()
    stand_in = TorchLinear(linear(), group_size=32, order=order() if shuffled else None)
    module.load_state_dict(stand_in.state_dict(), strict=False)
    module._init_wf_unsqueeze_buffers()
    assert torch.equal(packed_weight_of(module).dequantise(), stand_in.reference())  # type: ignore[union-attr]
    with torch.no_grad():
        module(UNIT)
    assert packed_weight_of(module).backend == "gptqmodel-aten"  # type: ignore[union-attr]
    with pytest.warns(SurgeryWarning, match="no gradient passes"):
        check(module)


def test_awq(optional: Load) -> None:
    module = real(optional, "torch_awq", "AwqTorchLinear", bits=4)
    stand_in = WQLinear_GEMM(linear(), group_size=32)
    module.load_state_dict(stand_in.state_dict(), strict=False)
    assert torch.equal(packed_weight_of(module).dequantise(), stand_in.reference())  # type: ignore[union-attr]
    check(module)


SCHEMES: dict[str, tuple[Callable[[nn.Linear], nn.Module], dict[str, Any]]] = {
    "awq": (
        lambda layer: WQLinear_GEMM(layer, group_size=32),
        {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    ),
    "gptq": (
        lambda layer: QuantLinear(layer, group_size=32),
        {"desc_act": False, "sym": False, "checkpoint_format": "gptq"},
    ),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which optimum reads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gptqmodel leaves a folder behind
@pytest.mark.parametrize("method", SCHEMES)
def test_adapters_on_a_checkpoint_that_transformers_loads(method: str, optional: Load, tmp_path: Path) -> None:
    optional("gptqmodel.nn_modules.qlinear.torch_awq")
    if method == "gptq":
        optional("optimum.gptq")
    make, settings = SCHEMES[method]
    transformers: Any = optional("transformers")
    files: Any = optional("safetensors.torch")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).half().eval()
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, make(module))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    described["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, **settings}
    (tmp_path / "config.json").write_text(json.dumps(described))

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    projection, own = loaded.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    packed = packed_weight_of(projection)
    assert packed is not None and torch.equal(packed.dequantise(), own.reference())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        base = loaded(ids).logits
        torch.testing.assert_close(base, model(ids).logits, rtol=1e-2, atol=1e-2)
        with pytest.warns(SurgeryWarning, match="no gradient passes"):
            apply_rules(loaded, LORA)
        assert not torch.equal(loaded(ids).logits, base)
        remove(loaded)
        assert torch.equal(loaded(ids).logits, base)
