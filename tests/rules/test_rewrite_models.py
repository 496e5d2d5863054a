"""RewriteRules on models of transformers: files, copies, training, generation, torch.compile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    Const,
    RuleError,
    SurgeryError,
    apply_rules,
    export_onnx,
    load_adapter,
    maybe,
    module_of,
    one_of,
    plan_rules,
    remove,
    save_adapter,
)
from surgery.rules import LoraRule, RewriteRule
from surgery.state.records import sites
from surgery.testing import Snapshot
from tests.support import tiny


def attention(q: Any, k: Any, v: Any, scale: Any, bias: Any, mask: Any) -> Any:
    scores = one_of(q @ k.mT * scale, q @ k.mT)
    return maybe(maybe(scores + bias) + mask).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any, mask: Any, match: Any) -> Tensor:
    total = bias if mask is None else mask if bias is None else bias + mask
    return F.scaled_dot_product_attention(q, k, v, total, match.dropout, scale=1.0 if scale is None else scale)


def rms_norm(x: Any, weight: Any, eps: Any = Const()) -> Any:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def one_rms_norm(x: Tensor, weight: Tensor, eps: float, match: Any) -> Tensor:
    return F.rms_norm(x, match.shape("weight"), weight, eps)


def gated(x: Any, up: Any = module_of(nn.Linear), gate: Any = module_of(nn.Linear)) -> Any:
    return F.silu(gate(x)) * up(x)


def joint_gated(x: Tensor, up: Any, gate: Any) -> Tensor:
    first, second = F.linear(x, torch.cat([gate.weight, up.weight])).chunk(2, -1)
    return F.silu(first) * second


def linear_after_norm(x: Any, linear: Any = module_of(nn.Linear), norm: Any = module_of(nn.LayerNorm)) -> Any:
    return linear(norm(x))


def folded_norm(x: Tensor, linear: Any, norm: Any) -> Tensor:
    plain = F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    return F.linear(plain, linear.weight * norm.weight, linear.weight @ norm.bias + linear.bias)


def residual_norm(x: Any, y: Any, weight: Any, eps: Any = Const()) -> Any:
    total = x + y
    return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)), total


def joint_residual_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, match: Any) -> Any:
    total = torch.add(x, y)
    return F.rms_norm(total, match.shape("weight"), weight, eps), total


RULES: dict[str, RewriteRule] = {
    "attention": RewriteRule(pattern=attention, replacement=fused),
    "rms-norm": RewriteRule(pattern=rms_norm, replacement=one_rms_norm),
    "gated": RewriteRule(pattern=gated, replacement=joint_gated),
    "linear-after-norm": RewriteRule(pattern=linear_after_norm, replacement=folded_norm),
    "residual-norm": RewriteRule(pattern=residual_norm, replacement=joint_residual_norm),
}
MODELS = {
    "bert": ("attention",),
    "gpt2": ("attention",),
    "llama": ("attention", "rms-norm", "gated", "residual-norm"),
    "t5": ("attention", "rms-norm"),
    "vit": ("attention", "linear-after-norm"),
}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, example = getattr(tiny, name)()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model.eval(), example


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in MODELS.items() for kind in kinds])
def test_a_rewritten_model_computes_the_same_and_comes_back(name: str, kind: str) -> None:
    model, example = made(name)
    whole, before = Snapshot(model), model(**example)[0]
    apply_rules(model, RULES[kind], example_inputs=example)
    after = model(**example)[0]
    assert torch.allclose(after, before, atol=1e-5) and len(list(sites(model))) >= 1
    (gradient,) = torch.autograd.grad(after.sum(), next(model.parameters()))
    remove(model)
    (expected,) = torch.autograd.grad(model(**example)[0].sum(), next(model.parameters()))
    assert torch.allclose(gradient, expected, atol=1e-4)
    assert not whole.differences(model) and torch.equal(model(**example)[0], before)


def test_all_rules_at_once_generate_the_same_tokens() -> None:
    model, example = made("llama")
    ids = example["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    apply_rules(model, [RULES[kind] for kind in ("attention", "rms-norm", "gated")], example_inputs=example)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert len(list(sites(model))) > 6


def test_files_copies_and_pickles(tmp_path: Path) -> None:
    model, example = made("llama")
    rule = RULES["rms-norm"]
    apply_rules(model, rule, example_inputs=example)
    expected = model(**example)[0]
    save_adapter(model, tmp_path / "adapter")
    other, _ = made("llama")
    with pytest.raises(SurgeryError, match="trust"):
        load_adapter(other, tmp_path / "adapter", example_inputs=example)
    load_adapter(other, tmp_path / "adapter", example_inputs=example, trust=True)
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**example)[0], expected)
        assert len(list(sites(copied))) == len(list(sites(model)))
        remove(copied)


def test_trained_tensors_of_a_replacement_are_saved(tmp_path: Path) -> None:
    model, example = made("bert")
    rule = RewriteRule(pattern=attention, replacement=scaled_fused, training="eval")
    apply_rules(model, rule, example_inputs=example)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2
    before = model(**example)[0]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    expected = model(**example)[0]
    assert not torch.allclose(expected, before)
    save_adapter(model, tmp_path / "adapter")
    other, _ = made("bert")
    load_adapter(other, tmp_path / "adapter", example_inputs=example, trust=True)
    assert torch.equal(other(**example)[0], expected)


def scaled_fused(q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any, mask: Any, match: Any, site: Any) -> Tensor:
    return fused(q, k, v, scale, bias, mask, match) * site.param("scale", (4, 1, 1), 1.0)


def test_beside_lora_on_modules_that_are_still_called() -> None:
    model, example = made("bert")
    apply_rules(model, RULES["attention"], adapter="fused", example_inputs=example)
    apply_rules(model, LoraRule(["query", "value"], rank=2), adapter="lora", example_inputs=example)
    plain, _ = made("bert")
    apply_rules(plain, LoraRule(["query", "value"], rank=2), adapter="lora", example_inputs=example)
    for (_, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        with torch.no_grad():
            p.copy_(q.add_(torch.randn_like(q) * 0.05) if q.requires_grad else q)
    assert torch.allclose(model(**example)[0], plain(**example)[0], atol=1e-6)
    remove(model, "fused")
    assert torch.equal(model(**example)[0], plain(**example)[0])


def test_compiled() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + 1

    model, x = Block(), torch.randn(2, 4)
    before = model(x)
    rule = RewriteRule(
        pattern=lambda x, w, b: F.gelu(F.linear(x, w, b)), replacement=lambda x, w, b: F.gelu(x @ w.mT + b)
    )
    apply_rules(model, rule, example_inputs=x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), before, atol=1e-6)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), before, atol=1e-6)


def branching(x: Any) -> Any:
    return torch.relu(x) if x.sum() > 0 else x


def looping(x: Any) -> Any:
    return [row.relu() for row in x][0]


@pytest.mark.parametrize(
    ("pattern", "replacement", "why"),
    [
        (branching, lambda x: x, "branches on a value"),
        (looping, lambda x: x, "iterates over a value"),
        (lambda x: None, lambda x: x, "does not have an operation"),
        (lambda x: x, lambda x: x, "does not have an operation"),
        (lambda x: (torch.relu(x), x), lambda x: (x, x), "a result of the structure is x|each result"),
        (lambda x: (), lambda x: x, "no result"),
        (lambda x, y: torch.relu(x), lambda x: x, "does not use its parameter y"),
        (lambda x: torch.relu(x), lambda x, z: x, "has the parameter z"),
        (lambda x: x(3).relu(), lambda x: x, "calls a value"),
    ],
)
def test_bad_patterns(pattern: Any, replacement: Any, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        RewriteRule(pattern=pattern, replacement=replacement)


def test_bad_replacements_leave_the_model_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4)
    whole = Snapshot(model)

    def decides(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2

    for replacement in (decides, lambda x: None, lambda x: x[0], lambda x: (x, x), lambda x: 1 / 0):
        rule = RewriteRule(pattern=lambda x: F.gelu(x), replacement=replacement)
        assert plan_rules(model, rule, example_inputs=x).problems or replacement is not decides
        with pytest.raises(SurgeryError):
            apply_rules(model, rule, example_inputs=x)
        assert not whole.differences(model)


def test_names_that_are_not_functions() -> None:
    model, example = made("bert")
    for name, why in {"tests.rules.no_such.f": "is not a function", "torch.pi": "is not a function"}.items():
        rule = RewriteRule(pattern=name, replacement="tests.rules.test_rewrite_models.fused")
        with pytest.raises(SurgeryError, match=why):
            apply_rules(model, rule, example_inputs=example)
    with pytest.raises(RuleError, match="a function, or its qualified name"):
        RewriteRule(pattern="attention", replacement=fused)
    with pytest.raises(RuleError):
        RewriteRule(pattern=attention)


def test_an_exported_file_has_the_replacement(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval(), torch.randn(2, 4)
    rule = RewriteRule(pattern=lambda x: F.gelu(x), replacement=lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)))
    apply_rules(model, rule, example_inputs=x)
    export_onnx(model, tmp_path / "model.onnx", x, adapters="constant")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.tensor(output), model(x), atol=1e-6)
