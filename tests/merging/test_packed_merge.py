"""Merges into quantised weights of every backend: as plain Linears, as new codes, and back to the bit."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LowRank,
    MergeError,
    PlanError,
    SurgeryError,
    apply_rules,
    forget,
    merge,
    merge_to,
    remove,
    unmerge,
)
from surgery.packed.packed_weight import packed_weight_of
from surgery.rules import BiasRule, IA3Rule, LoraRule
from tests.support.quantised import BACKENDS, BY_NAME, QuantisedLinear

# Backends of each kind of layout; the rest run in the sweep.
FEW = ["bitsandbytes Linear8bitLt", "bitsandbytes Linear4bit nf4, double", "torchao int4, blocks of 32"]
CHOSEN = BACKENDS if os.environ.get("SURGERY_EXAMPLES") else [BY_NAME[name] for name in FEW]
every_backend = pytest.mark.parametrize("backend", CHOSEN, ids=lambda backend: backend.name)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*no gradient passes:surgery.errors.SurgeryWarning"),
]
LORA = LoraRule(["0", "2"], rank=4, init="random")
MODES: Any = ["dequantise", "requantise"]


def quantised(backend: QuantisedLinear, *, width: int = 64, rule: Any = LORA) -> nn.Sequential:
    torch.manual_seed(0)
    try:
        layers = [backend.build(nn.Linear(width, width)) for _ in range(2)]
    except ImportError:
        pytest.skip(f"{backend.package} is not installed")
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    return apply_rules(model, rule) if rule is not None else model


def packed(module: nn.Module) -> Any:
    weight = packed_weight_of(module)
    assert weight is not None
    return weight


def bits(model: nn.Module) -> Iterator[tuple[str, bytes]]:
    """The codes, scales and biases of the quantised modules, to the bit."""
    for path, module in model.named_modules():
        if ".adapters" not in path and (weight := packed_weight_of(module)) is not None:
            named = {**weight.tensors(), "bias": module.bias}
            yield from ((f"{path}.{name}", raw(tensor)) for name, tensor in named.items() if tensor is not None)


def raw(tensor: Any) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def delta(model: nn.Module, path: str) -> Tensor:
    box: Any = model.get_submodule(f"{path}.adapters.default")
    return 2.0 * (box.B.detach().double() @ box.A.detach().double())


@every_backend
def test_dequantised_is_the_dequantised_weight_plus_the_change(backend: QuantisedLinear) -> None:
    model = quantised(backend)
    x = torch.randn(5, 64)
    live, before, keys, names = model(x), dict(bits(model)), list(model.state_dict()), list(model[0].__dict__)
    expected = {path: packed(model.get_submodule(path)).dequantise().double() + delta(model, path) for path in "02"}
    seen: list[Any] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    weights = [model[0].weight, model[2].weight]
    report = merge(model, quantised="dequantise")
    for path in "02":
        layer: Any = model.get_submodule(path)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight.double(), expected[path], rtol=0, atol=1e-6)
        assert list(layer._parameters) == ["weight", "bias"]
    assert [loss.share for loss in report.loss.tensors] == pytest.approx([0, 0], abs=1e-5)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name})
    assert torch.equal(model(x), plain(x)) and seen == [1]
    unmerge(model)
    assert dict(bits(model)) == before and torch.equal(model(x), live) and len(seen) == 2
    assert list(model.state_dict()) == keys and list(model[0].__dict__) == names
    assert model[0].weight is weights[0] and model[2].weight is weights[1]


@every_backend
@pytest.mark.parametrize("keep", ["record", "copy"])
def test_requantised_codes_are_told_and_restored(backend: QuantisedLinear, keep: Any) -> None:
    model = quantised(backend)
    x = torch.randn(5, 64)
    live, before, keys = model(x), dict(bits(model)), list(model.state_dict())
    classes = [packed(model[0]).module.__class__.__mro__[1].__name__]
    start = {path: packed(model.get_submodule(path)).dequantise().double() for path in "02"}
    report = merge(model, quantised="requantise", limit=None, keep=keep)
    for loss in report.loss.tensors:
        got = packed(model.get_submodule(loss.site)).dequantise().double()
        change = delta(model, loss.site)
        assert loss.norm == pytest.approx(float(change.norm()), rel=1e-4)
        assert loss.error == pytest.approx(float((got - start[loss.site] - change).norm()), rel=1e-4)
        assert loss.share is not None and loss.share < 0.35 and loss.dtype == packed(model[0]).layout
    assert dict(bits(model)) != before and classes
    assert (model(x) - live).norm() < 0.35 * live.norm()
    assert report.nbytes > 0
    unmerge(model)
    assert dict(bits(model)) == before and torch.equal(model(x), live) and list(model.state_dict()) == keys


@every_backend
def test_error_feedback_on_inputs_halves_what_outputs_lose(backend: QuantisedLinear) -> None:
    """The reference is the nearest code under refitted scales, as PEFT merges."""
    model = quantised(backend, rule=LoraRule("0", rank=4, init="random"))
    x = torch.randn(256, 8) @ torch.randn(8, 64)
    weight = packed(model[0])
    wanted = weight.dequantise().float() + delta(model, "0").float()
    old = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    weight.write(weight.requantise(wanted))
    naive = float(((weight.dequantise().float() - wanted) @ x.t()).norm() / (delta(model, "0").float() @ x.t()).norm())
    weight.write(old)
    before = dict(bits(model))
    report = merge(model, quantised="requantise", limit=None, example_inputs=x)
    off = (packed(model[0]).dequantise().float() - wanted) @ x.t()
    lost = float(off.norm() / (delta(model, "0").float() @ x.t()).norm())
    assert report.loss.tensors[0].outputs == pytest.approx(lost, rel=0.02)
    assert lost < 0.5 * naive and report.loss.difference is not None
    unmerge(model)
    assert dict(bits(model)) == before


def test_a_loss_over_the_limit_is_refused_at_all_sites_and_changes_nothing() -> None:
    model = quantised(BY_NAME["bitsandbytes Linear4bit nf4"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.mul_(0.02)
    x = torch.randn(5, 64)
    live, before = model(x), dict(bits(model))
    with pytest.raises(PlanError) as caught:
        merge(model, quantised="requantise")
    assert [problem.where for problem in caught.value.problems] == ["0", "2"]
    assert all("of ‖ΔW‖" in str(problem.why) and "limit=None" in str(problem.fix) for problem in caught.value.problems)
    assert dict(bits(model)) == before and torch.equal(model(x), live)
    assert merge(model, quantised="requantise", limit=None).loss.share > 0.1
    unmerge(model)
    assert dict(bits(model)) == before and torch.equal(model(x), live)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_the_middle_changes_nothing(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"])
    x = torch.randn(5, 64)
    live, before, names = model(x), dict(bits(model)), list(model[0].__dict__)
    with torch.no_grad():
        value = model[2].adapters.default.B[0, 0].item()  # type: ignore[operator,union-attr]
        model[2].adapters.default.B[0, 0] = float("nan")  # type: ignore[operator,union-attr]
    with pytest.raises(MergeError, match="not finite"):
        merge(model, quantised=mode, safe=True, limit=None)
    with torch.no_grad():
        model[2].adapters.default.B[0, 0] = value  # type: ignore[operator,union-attr]
    assert dict(bits(model)) == before and torch.equal(model(x), live) and list(model[0].__dict__) == names


@pytest.mark.parametrize("mode", MODES)
def test_several_rules_biases_and_another_live_adapter(mode: Any) -> None:
    rules = [LORA, IA3Rule("0", feedforward=()), BiasRule(["0"])]
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"], rule=rules)
    apply_rules(model, LoraRule("2", rank=2, init="random"), adapter="other")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(5, 64)
    live, before = model(x), dict(bits(model))
    bias = model[0].bias
    merge(model, "default", quantised=mode, limit=None)
    slack = 1e-5 if mode == "dequantise" else 0.1
    assert (model(x) - live).norm() < slack * live.norm()
    with pytest.raises(SurgeryError):
        merge(model, "other", quantised=mode)
    unmerge(model)
    assert dict(bits(model)) == before and torch.equal(model(x), live) and model[0].bias is bias


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_unmerge_to_the_same_bits(mode: Any) -> None:
    model = quantised(BY_NAME["bitsandbytes Linear4bit nf4"])
    x = torch.randn(5, 64)
    live, before = model(x), dict(bits(model))
    merge(model, quantised=mode, limit=None)
    merged = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), merged)
        unmerge(again)
        assert dict(bits(again)) == before and torch.equal(again(x), live)
    assert torch.equal(model(x), merged)
    unmerge(model)
    assert dict(bits(model)) == before and torch.equal(model(x), live)


@pytest.mark.parametrize("mode", MODES)
def test_changed_weights_are_refused(mode: Any) -> None:
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"])
    before = dict(bits(model))
    merge(model, quantised=mode, limit=None)
    with torch.no_grad():
        tensor = model[0].weight if mode == "dequantise" else packed(model[0]).tensors()["weight"]
        tensor[0, 0] += 1  # type: ignore[index,operator]
    with pytest.raises(MergeError, match="changed since a rule folded"):
        unmerge(model)
    unmerge(model, check=False)
    after = dict(bits(model))
    assert after == before if mode == "dequantise" else after["0.SCB"] == before["0.SCB"]


@pytest.mark.parametrize("mode", MODES)
def test_forget_leaves_an_ordinary_model(mode: Any) -> None:
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"])
    kind = type(quantised(BY_NAME["bitsandbytes Linear8bitLt"], rule=None)[0])
    x = torch.randn(5, 64)
    merge(model, quantised=mode, limit=None)
    merged = model(x)
    forget(model)
    assert torch.equal(model(x), merged) and not [name for name in model.state_dict() if "adapters" in name]
    assert type(model[0]) is (nn.Linear if mode == "dequantise" else kind)


def test_removing_after_a_merge_and_unmerge_leaves_the_base() -> None:
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"], rule=None)
    before, kind = dict(bits(model)), type(model[0])
    for mode in MODES:
        apply_rules(model, LORA)
        merge(model, quantised=mode, limit=None)
        remove(unmerge(model))
        assert dict(bits(model)) == before and type(model[0]) is kind


def test_wrong_arguments_say_what_is_right() -> None:
    model = quantised(BY_NAME["bitsandbytes Linear8bitLt"])
    wrong: Any = "yes"
    with pytest.raises(MergeError, match="'yes' is not known"):
        merge(model, quantised=wrong)
    with pytest.raises(MergeError, match="dtype is not used"):
        merge(model, dtype=torch.float16)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64, wrong):
        with pytest.raises(MergeError, match="can't be used here"):
            merge(model, quantised="dequantise", dtype=dtype)
    for limit in (-0.1, float("nan"), True, wrong):
        with pytest.raises(MergeError, match="limit=.* is not a share"):
            merge(model, quantised="requantise", limit=limit)
    merge(model, quantised="dequantise", dtype=torch.float16)
    assert model[0].weight.dtype == torch.float16
    assert LowRank
    model.to("meta")
    with pytest.raises(MergeError, match="on the meta device"):
        unmerge(model)


def _model(bits_: int) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = transformers.LlamaConfig(**sizes, vocab_size=60)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    return transformers, model, transformers.BitsAndBytesConfig(**{f"load_in_{bits_}bit": True})


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_merge_to_writes_what_transformers_reloads(mode: Any, width: int, tmp_path: Path) -> None:
    transformers, plain, config = _model(width)
    plain.save_pretrained(tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(tmp_path / "base", quantization_config=config, device_map="cpu").eval()
    apply_rules(model, LoraRule(["q_proj", "down_proj"], rank=4, init="random"))
    ids = torch.randint(0, 60, (2, 7))
    live, before, quantiser = model(ids).logits, dict(bits(model)), model.hf_quantizer
    merge(model, quantised=mode, limit=None)
    merged = model(ids).logits
    unmerge(model)
    assert dict(bits(model)) == before and model.hf_quantizer is quantiser
    merge_to(model, tmp_path / "merged", quantised=mode, limit=None)
    assert dict(bits(model)) == before and torch.equal(model(ids).logits, live)
    assert model.hf_quantizer is quantiser and model.config.quantization_config
    again = load(tmp_path / "merged", device_map="cpu").eval()
    assert (getattr(again.config, "quantization_config", None) is None) == (mode == "dequantise")
    if mode == "requantise":
        assert torch.equal(again(ids).logits, merged)
    else:
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
        assert (again(ids).logits - merged).norm() < (2e-2 if width == 8 else 1e-5) * merged.norm()


@pytest.mark.parametrize("mode", MODES)
def test_tensors_of_the_user_stay(mode: Any) -> None:
    """A buffer and a parameter that a user gave to a quantised module are there while merged, and after."""
    model = quantised(BACKENDS[0])
    layer: Any = model[0]
    layer.register_buffer("seen", torch.zeros(1))
    layer.register_buffer("hidden", torch.ones(1), persistent=False)
    layer.register_parameter("gate", nn.Parameter(torch.ones(2)))
    keys = list(model.state_dict())
    merge(model, quantised=mode, limit=None)
    merged_keys = set(model.state_dict())
    assert {"0.seen", "0.gate"} <= merged_keys and "0.hidden" not in merged_keys and layer.hidden.item() == 1
    layer.seen += 1
    layer.register_buffer("later", torch.full((1,), 3.0))
    layer.gate = nn.Parameter(torch.full((2,), 2.0))
    unmerge(model)
    assert layer.seen.item() == 1 and layer.later.item() == 3 and layer.gate.tolist() == [2, 2]
    assert [key for key in model.state_dict() if key != "0.later"] == keys


def test_a_model_of_packed_weights_alone_takes_inputs_of_any_dtype() -> None:
    """Its plain Linears have the dtype of the dequantised weight, and compute in that of the input, as kernels do."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16).to("cpu")
    model: Any = apply_rules(nn.Sequential(layer), LoraRule("0", rank=2, init="random"))
    x = torch.randn(3, 64)
    live = model(x)
    merge(model, quantised="dequantise")
    assert model[0].weight.dtype is torch.bfloat16 and isinstance(model[0], nn.Linear)
    assert model(x).dtype is torch.float32 and model(x.bfloat16()).dtype is torch.bfloat16
    assert float((model(x) - live).detach().norm() / live.detach().norm()) < 0.02  # bfloat16 has 8 bits
    unmerge(model)
    assert torch.equal(model(x), live)
