"""Merges into packed stacks of experts, beside merges into the same experts with plain numbers."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import PlanError, apply_rules, forget, merge, merge_to, packed_stacks_of, remove, synced, unmerge
from surgery.rules import ExpertLoraRule
from tests.support.packed_experts import EXPERT_MODELS, LAYOUTS, ExpertModel

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
IDS = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(0))
KINDS = {
    "GptOssForCausalLM": "GptOssExperts",
    "Qwen3MoeForCausalLM": "Qwen3MoeExperts",
    "Llama4ForCausalLM": "Llama4TextExperts",
}
every_layout = pytest.mark.parametrize("case", LAYOUTS)
both_modes = pytest.mark.parametrize("mode", ["dequantise", "requantise"])


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return apply_rules(model, ExpertLoraRule("experts", rank=2, init="random"))


def bits(model: nn.Module) -> list[Tensor]:
    stacks = [stack for module in model.modules() for stack in packed_stacks_of(module).values()]
    return [tensor.flatten().view(torch.uint8).clone() for stack in stacks for tensor in stack.tensors().values()]


def form(model: nn.Module) -> list[Any]:
    """The class and the attributes of each module, in their order."""
    return [(type(module), list(module.__dict__)) for module in model.modules()]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@every_layout
def test_dequantised_is_the_merge_of_plain_experts_and_goes_back_to_the_bit(case: ExpertModel) -> None:
    packed, plain = map(adapted, case.build())
    before, live, was = bits(packed), logits(packed), form(packed)
    report = merge(packed, quantised="dequantise")
    merge(plain)
    assert {type(m).__name__ for p, m in packed.named_modules() if p.endswith(".experts")} == {
        KINDS[type(packed).__name__]
    }
    assert (
        report.loss.share < 1e-6 and [loss.tensor for loss in report.loss.tensors] == ["gate_up_proj", "down_proj"] * 2
    )
    actual, expected = packed.state_dict(), plain.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(packed), logits(plain)) and not bits(packed)
    unmerge(packed)
    assert all(map(torch.equal, bits(packed), before)) and len(bits(packed)) == len(before)
    assert form(packed) == was and torch.equal(logits(packed), live)


@every_layout
def test_requantised_codes_are_told_and_go_back_to_the_bit(case: ExpertModel) -> None:
    packed, plain = map(adapted, case.build())
    before, live, was = bits(packed), logits(packed), form(packed)
    with pytest.raises(PlanError, match=r"quantising the merged weight loses too much[\s\S]*the limit is 0%"):
        merge(packed, quantised="requantise", limit=0.001)
    assert all(map(torch.equal, bits(packed), before)) and form(packed) == was and torch.equal(logits(packed), live)
    base = {
        path: {n: s.dequantise().float() for n, s in packed_stacks_of(m).items()} for path, m in packed.named_modules()
    }
    report = merge(packed, quantised="requantise", limit=None)
    merge(plain)
    for loss in report.loss.tensors:
        stack = packed_stacks_of(packed.get_submodule(loss.site))[loss.tensor]
        merged = getattr(plain.get_submodule(loss.site), loss.tensor)
        norm, error = merged - base[loss.site][loss.tensor], stack.dequantise().float() - merged
        assert loss.norm == pytest.approx(float(norm.norm()), rel=1e-5)
        assert loss.error == pytest.approx(float(error.norm()), rel=1e-5)
    assert not all(map(torch.equal, bits(packed), before))
    unmerge(packed)
    assert all(map(torch.equal, bits(packed), before))
    assert form(packed) == was and torch.equal(logits(packed), live)


def test_a_merge_is_refused_with_the_ways() -> None:
    packed = adapted(EXPERT_MODELS[0].build()[0])
    with pytest.raises(
        PlanError, match=r"gate_up_proj and down_proj are packed \(mxfp4[\s\S]*quantised=\"dequantise\""
    ):
        merge(packed)


@both_modes
def test_copies_pickles_and_removal(mode: Any) -> None:
    packed = EXPERT_MODELS[2].build()[0]
    before, was = bits(packed), form(packed)
    merge(adapted(packed), quantised=mode, limit=None)
    merged = logits(packed) if mode == "dequantise" else None
    torch.save(packed, file := io.BytesIO())
    file.seek(0)
    for twin in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert merged is None or torch.equal(logits(twin), merged)
        unmerge(twin)
        assert all(map(torch.equal, bits(twin), before))
    unmerge(packed)
    remove(packed)
    assert all(map(torch.equal, bits(packed), before)) and form(packed) == was


def test_forgotten_experts_are_those_of_the_architecture() -> None:
    packed, plain = map(adapted, EXPERT_MODELS[0].build())
    for model in (packed, plain):
        merge(model, quantised="dequantise")
        forget(model)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(packed), logits(plain))


def test_synced_gives_the_merged_stacks_by_the_names_of_plain_experts() -> None:
    packed, plain = map(adapted, EXPERT_MODELS[0].build())
    before = bits(packed)
    with synced(packed, quantised="dequantise") as tensors:
        actual = dict(tensors)
    merge(plain)
    expected = {name: tensor for name, tensor in plain.state_dict().items() if "adapters" not in name}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert all(map(torch.equal, bits(packed), before))


def _loaded_mxfp4(folder: Path) -> Any:
    """gpt-oss with the marks that transformers gives a model that it loads in MXFP4."""
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_mxfp4")
    model, config = EXPERT_MODELS[1].build()[0], transformers.Mxfp4Config()
    model.config.quantization_config, model.is_quantized = config, True
    model.hf_quantizer = quantizer.Mxfp4HfQuantizer(config)
    return model


def _loaded_fp8(folder: Path) -> Any:
    """Qwen3-MoE with experts that transformers quantised, saved and loaded itself, as it does on a GPU."""
    skipped = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "mlp.gate")]
    settings = {"weight_block_size": (32, 32), "modules_to_not_convert": ["lm_head", *skipped]}
    EXPERT_MODELS[2].build()[1].save_pretrained(folder / "plain")
    config, load = transformers.FineGrainedFP8Config(**settings), transformers.AutoModelForCausalLM.from_pretrained
    load(folder / "plain", quantization_config=config, dtype=torch.float32).save_pretrained(folder / "fp8")
    return load(folder / "fp8", dtype=torch.float32)


@both_modes
@pytest.mark.parametrize("load", [_loaded_mxfp4, _loaded_fp8])
def test_merge_to_writes_what_transformers_reloads(
    mode: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8: Any = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8").FineGrainedFP8HfQuantizer
    monkeypatch.setattr(fp8, "validate_environment", lambda *args, **settings: None)  # it asks for a GPU
    model = adapted(load(tmp_path))
    before, was = bits(model), form(model)
    merge_to(model, tmp_path / "merged", quantised=mode, limit=None)
    assert all(map(torch.equal, bits(model), before)) and form(model) == was
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    merge(model, quantised=mode, limit=None)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("quantization_config" in config) == (mode == "requantise")
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            stacks, others = packed_stacks_of(module), packed_stacks_of(new.get_submodule(path))
            for name in ("gate_up_proj", "down_proj"):
                values = [s[name].dequantise() if s else m._parameters[name] for s, m in
                          ((stacks, module), (others, new.get_submodule(path)))]  # fmt: skip
                assert torch.equal(values[0].float(), values[1].float())
