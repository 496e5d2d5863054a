"""PrefixRule on attention that a forward writes out: each way to write it, beside plain arithmetic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, apply_rules, remove
from surgery.rules import LoraRule, PrefixRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.written_attention import HEADS, SIZE, WIDTH, Base, Biased, Called, Flat, Plain, merge_heads

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


class ScaledQueries(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.q(x)) / SIZE**0.5, self.heads(self.k(x)), self.heads(self.v(x))
        scores = torch.matmul(q, k.transpose(-1, -2))
        if mask is not None:
            scores = torch.max(scores + mask, torch.tensor(torch.finfo(scores.dtype).min))
        return self.out(merge_heads(F.dropout(nn.Softmax(dim=-1)(scores), 0.0, self.training) @ v))


class Shifted(Base):
    """Numbers that are added equally for every key, which do not change a softmax."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = q @ k.mT / SIZE**0.5 - 1.5 + x[:, None, :, :1]
        if mask is not None:
            scores = scores + mask
        return self.out(merge_heads(scores.softmax(-1) @ v))


def expected(model: Base, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q [Pk; k]ᵀ / √d + [0 | mask]) [Pv; v]."""
    params: Any = model.get_submodule("adapters.default")
    q, k, v = (model.heads(part(x)) for part in (model.q, model.k, model.v))
    unit = SIZE**0.5 if isinstance(model, ScaledQueries) else 1.0
    scale = 1.0 if isinstance(model, ScaledQueries) else SIZE**-0.5
    key, value = (tensor.expand(x.shape[0], -1, -1, -1) for tensor in (params.key, params.value))
    wide = torch.zeros(1, 1, x.shape[1], key.shape[-2] + x.shape[1])
    if mask is not None:
        wide[..., key.shape[-2] :] = mask
    scores = torch.cat([q / unit @ key.mT * scale, q @ k.mT / SIZE**0.5], -1) + wide
    return model.out(merge_heads(scores.softmax(-1) @ torch.cat([value, v], -2)))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


FORMS = [Plain, ScaledQueries, Flat, Biased, Shifted, Called]
X = torch.randn(2, 5, WIDTH)
CAUSAL = torch.full((5, 5), -1e9).triu(1)


def disturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_it_is_attention_with_more_keys(form: type[Base]) -> None:
    model = form()
    before = first(model(X))
    disturb(apply_rules(model, PrefixRule(length=3), example_inputs=X))
    assert model.adapters.default.key.shape == (HEADS, 3, SIZE)  # type: ignore[union-attr]
    for training in (True, False):
        model.train(training)
        for x, mask in ((X, None), (X, CAUSAL), (torch.randn(4, 7, WIDTH), None)):
            torch.testing.assert_close(first(model(x, mask)), expected(model, x, mask), **CLOSE)
    first(model(X)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "adapters" in name)
    remove(model)
    assert torch.equal(first(model(X)), before)


@pytest.mark.parametrize("form", FORMS)
def test_removal_is_exact(form: type[Base]) -> None:
    assert_reversible(form(), [PrefixRule(length=2), LoraRule("v", rank=2)], example_inputs=X)


@pytest.mark.parametrize("form", FORMS)
def test_prefixes_stack_and_leave_in_any_order(form: type[Base]) -> None:
    model = form().eval()
    before, snapshot = first(model(X)), Snapshot(model)
    apply_rules(model, PrefixRule(length=3), adapter="default", example_inputs=X)
    apply_rules(model, PrefixRule(length=2), adapter="b", example_inputs=X)
    disturb(model)
    both = first(model(X, CAUSAL))
    joined = form().eval()
    joined.load_state_dict(model.state_dict(), strict=False)
    apply_rules(joined, PrefixRule(length=5), example_inputs=X)
    params: Any = model.adapters
    with torch.no_grad():
        for name in ("key", "value"):
            tensors = [getattr(params.default, name), getattr(params.b, name)]
            getattr(joined.adapters.default, name).copy_(torch.cat(tensors, -2))  # type: ignore[union-attr]
    torch.testing.assert_close(both, first(joined(X, CAUSAL)), **CLOSE)
    remove(model, "b")
    torch.testing.assert_close(first(model(X, CAUSAL)), expected(model, X, CAUSAL), **CLOSE)
    remove(model)
    assert snapshot.differences(model) == [] and torch.equal(first(model(X)), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_has_a_softmax_of_its_own(form: type[Base]) -> None:
    model = form().eval()
    before = first(model(X, CAUSAL))
    apply_rules(model, PrefixRule(length=3, gate=True), example_inputs=X)
    assert torch.equal(first(model(X, CAUSAL)), before)
    disturb(model)
    params: Any = model.adapters.default  # type: ignore[union-attr]
    q = model.heads(model.q(X)) / SIZE**0.5
    beside = (q @ params.key.mT).softmax(-1) @ params.value * params.gate.tanh().view(-1, 1, 1)
    added = F.linear(merge_heads(beside), model.out.weight)
    torch.testing.assert_close(first(model(X, CAUSAL)), before + added, **CLOSE)


def test_a_causal_call_of_torch_s_own_function() -> None:
    model = disturb(apply_rules(Called(), PrefixRule(length=3), example_inputs=X)).eval()
    torch.testing.assert_close(model(X, causal=True), expected(model, X, CAUSAL), **CLOSE)  # type: ignore[arg-type]


def test_weights_that_are_returned_are_those_of_the_text() -> None:
    model = disturb(apply_rules(Plain(), PrefixRule(length=3), example_inputs=X)).eval()
    weights = model(X)[1]
    assert weights.shape == (2, HEADS, 5, 5) and bool((weights.sum(-1) < 1).all())


def test_cross_attention_is_passed_over_unless_named() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Plain()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, None, y)[0]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.theirs = Plain(), Cross()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.theirs(self.mine(x)[0], y)

    class KeysFromOther(Plain):
        def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Any:
            assert other is not None
            q, k, v = self.heads(self.q(x)), self.heads(self.k(other)), self.heads(self.v(other))
            return (self.out(merge_heads((q @ k.mT).softmax(-1) @ v)),)

    model = Both()
    model.theirs.attention = KeysFromOther()
    y = torch.randn(2, 9, WIDTH)
    apply_rules(model, PrefixRule(length=2), example_inputs=(X, y))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "mine.adapters.default.key",
        "mine.adapters.default.value",
    }
    apply_rules(model, PrefixRule("theirs.attention", length=2), adapter="cross", example_inputs=(X, y))
    assert hasattr(model.theirs.attention, "adapters")


def other_ways() -> dict[str, Callable[[], nn.Module]]:
    class Einsum(Base):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            return self.out(merge_heads(torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1) @ v))

    class PerKey(Base):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            return self.out(merge_heads((q @ k.mT * torch.ones(x.shape[1])).softmax(-1) @ v))

    class Twice(Base):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            return self.out(merge_heads((q @ k.mT).softmax(-1) @ v + (k @ q.mT).softmax(-1) @ v))

    class Interleaved(Base):
        """Heads before the batch: no shape tells them apart, so the plan refuses them."""

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = (self.heads(p(x)).transpose(0, 1).reshape(b * HEADS, n, SIZE) for p in (self.q, self.k, self.v))
            context = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(HEADS, b, n, SIZE).transpose(0, 1)
            return self.out(merge_heads(context))

    return {"einsum": Einsum, "a factor for each key": PerKey, "two": Twice, "heads first": Interleaved}


@pytest.mark.parametrize("name", other_ways())
def test_other_forms_are_refused(name: str) -> None:
    model = other_ways()[name]()
    snapshot = Snapshot(model)
    with pytest.raises(PlanError, match="finds no attention that it can extend"):
        apply_rules(model, PrefixRule(length=2), example_inputs=X)
    assert snapshot.differences(model) == []


# transformers -------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 3, 9, 2, 7, 1], [4, 8, 6, 2, 1, 3]])
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, initializer_range=0.3,
    )  # fmt: skip
    return transformers.DebertaV2Model(config)


def gptj() -> Any:
    config = transformers.GPTJConfig(vocab_size=20, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, initializer_range=0.3)
    return transformers.GPTJForCausalLM(config)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=20, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    return transformers.BloomForCausalLM(config)


def falcon() -> Any:
    config = transformers.FalconConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return transformers.FalconForCausalLM(config)


def xglm() -> Any:
    config = transformers.XGLMConfig(vocab_size=20, d_model=32, num_layers=2, attention_heads=4, ffn_dim=32)
    return transformers.XGLMForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {"gptj": gptj, "bloom": bloom, "falcon": falcon, "xglm": xglm}


def test_deberta_beside_its_own_forward_with_a_wider_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deberta().eval()
    disturb(apply_rules(model, PrefixRule("layer.0.attention.self", length=3), example_inputs={"input_ids": IDS}))
    site: Any = model.encoder.layer[0].attention.self
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": PADDED}
    actual = model(**inputs).last_hidden_state

    params, real, seen = site.adapters.default, F.softmax, {}
    site.query_proj.register_forward_hook(lambda module, args, output: seen.update(query=output))

    def wider(scores: Tensor, dim: int = -1, **kwargs: Any) -> Tensor:
        if "query" not in seen:
            return real(scores, dim, **kwargs)
        query = seen.pop("query").view(2, 6, 4, 8).transpose(1, 2)
        weights = real(torch.cat([query @ params.key.mT, scores.view(2, 4, 6, 6)], -1), -1)
        seen["added"] = (weights[..., :3] @ params.value).transpose(1, 2).reshape(2, 6, 32)
        return weights[..., 3:].reshape(scores.shape)

    class Untouched(type(site)._surgery_base):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            context, *rest = super().forward(*args, **kwargs)
            return (context + seen.pop("added"), *rest)

    site.__class__ = Untouched
    monkeypatch.setattr(torch.nn.functional, "softmax", wider)
    torch.testing.assert_close(model(**inputs).last_hidden_state, actual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generating_with_and_without_a_cache(name: str) -> None:
    model = MODELS[name]().eval()
    before = model(IDS).logits
    disturb(apply_rules(model, PrefixRule(length=3), example_inputs={"input_ids": IDS}))
    inputs: dict[str, Any] = {"attention_mask": PADDED, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    with_cache = model.generate(IDS, use_cache=True, **inputs)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **inputs))
    beams = model.generate(IDS, use_cache=True, num_beams=3, **inputs)
    assert torch.equal(beams, model.generate(IDS, use_cache=False, num_beams=3, **inputs))
    remove(model)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("make", [deberta, gptj, bloom])
def test_gradient_checkpointing_reaches_every_tensor(make: Callable[[], Any]) -> None:
    model = make()
    apply_rules(
        model,
        [PrefixRule(length=3), LoraRule("re:.*(query|key|value|q_proj|v_proj).*", rank=2)],
        example_inputs={"input_ids": IDS},
    )
    disturb(model).train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=IDS, attention_mask=PADDED)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plainly = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    for name, gradient in plainly.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert math.isfinite(sum(float(gradient.sum()) for gradient in plainly.values()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the settings have new names in the latest transformers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    config = deberta().config
    config.num_labels = 2
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": PADDED}
    before, snapshot = model(**inputs).logits, Snapshot(model)
    apply_rules(model, [PrefixRule(length=3)], example_inputs=inputs)
    texts = [{"input_ids": IDS[i % 2], "attention_mask": PADDED[i % 2], "labels": i % 2} for i in range(16)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=4, learning_rate=3e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=texts)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    remove(model.eval())
    if not checkpointing:  # which leaves a hook of transformers' own on the embeddings
        assert [actual for actual in snapshot.differences(model) if "config" not in actual] == []
    assert torch.equal(model(**inputs).logits, before)
