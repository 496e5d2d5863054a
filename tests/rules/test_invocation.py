"""LoraRule's `invocation` (aLoRA): the adapter acts on a text's tokens from the last invocation on."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    PlanError,
    RuleError,
    SiteError,
    SurgeryError,
    SurgeryWarning,
    active,
    apply_rules,
    combine,
    copy_adapter,
    export_onnx,
    load_adapter,
    merge,
    plan_rules,
    remove,
    rename_adapter,
    route,
    rules_of,
    save_adapter,
    using,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.conformance import of_transformers

CALL = [3, 4]
IDS = torch.tensor([[1, 3, 4, 5, 6, 7], [3, 4, 9, 3, 4, 2], [1, 2, 5, 6, 7, 8], [3, 4, 5, 6, 8, 9]])
BEGINS = [1, 3, 6, 0]  # where each row's last invocation begins


def base(name: str = "LlamaForCausalLM", **fields: Any) -> Any:
    torch.manual_seed(0)
    return of_transformers(name, num_hidden_layers=2, **fields).eval()


def adapted(model: Any = None, adapter: str = "default", invocation: Any = CALL, **fields: Any) -> Any:
    torch.manual_seed(1)
    rule = LoraRule("all-linear", rank=4, alpha=32, init="random", invocation=invocation, **fields)
    return apply_rules(base() if model is None else model, rule, adapter=adapter)


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def test_the_adapter_acts_from_the_last_invocation_on() -> None:
    """An invocation at the start is plain LoRA; a row without one, and tokens before it, have the base's bits."""
    model, plain, always = adapted(), logits(base()), logits(adapted(invocation=None))
    output = logits(model)
    for row, begin in enumerate(BEGINS):
        assert torch.equal(output[row, :begin], plain[row, :begin])
        assert begin == 6 or not torch.isclose(output[row, begin:], plain[row, begin:]).all(-1).any()
    assert torch.allclose(output[3], always[3], atol=1e-6) and not torch.allclose(output[0], always[0], atol=1e-2)
    assert torch.equal(remove(model)(IDS).logits, base()(IDS).logits)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_cache_remembers_which_rows_are_invoked(name: str) -> None:
    model = adapted(base(name))
    with torch.no_grad():
        whole = logits(model, torch.cat([IDS, torch.full((4, 3), 11)], 1))
        first = model(input_ids=IDS, use_cache=True)
        cache, steps = first.past_key_values, [first.logits]
        for _ in range(3):
            steps.append(model(input_ids=torch.full((4, 1), 11), past_key_values=cache).logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_a_text_may_come_in_chunks() -> None:
    """The cache of tokens before the invocation is the base's, so others may have filled it."""
    model, ids = adapted(), IDS[[0, 2]].repeat(1, 2)  # invoked last in columns 7 and 8
    ids[0, 1:3] = 9
    with torch.no_grad():
        for chunks in ([3, 9], [7, 5], [5, 3, 4]):
            cache, parts = None, []
            for part in ids.split(chunks, 1):
                result = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache, parts = result.past_key_values, [*parts, result.logits]
            near = [1e-5] * 12 if chunks != [5, 3, 4] else [1e-5] * 7  # this split cuts the invocation in two
            assert torch.allclose(torch.cat(parts, 1)[0, : len(near)], logits(model, ids)[0, : len(near)], atol=1e-5)
            assert not torch.allclose(parts[-1][0], logits(base(), ids)[0, -chunks[-1] :], atol=1e-3)
        with using(model, None):
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        later = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    assert torch.allclose(later, logits(model, ids)[:, 6:], atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_cropped_cache_forgets_the_invocation(length: int) -> None:
    """Row 0 is invoked at 1: by three tokens on, and not by two, whose second half was cut off."""
    model, later = adapted(), torch.full((1, 2), 11)
    text = torch.cat([IDS[:1, :length], later], 1)
    with torch.no_grad():
        cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
        cache.crop(length - 6)
        result = model(input_ids=later, past_key_values=cache).logits
        if length != 2:
            assert torch.allclose(result, logits(model, text)[:, length:], atol=1e-5)
            return
        cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
        cache.crop(length - 6)
        with using(model, None):
            off = model(input_ids=later, past_key_values=cache).logits
    assert torch.allclose(result, off, atol=1e-5)


def test_generation_and_beams() -> None:
    model = adapted()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = model.generate(IDS, **options)
    assert torch.equal(both[2], base().generate(IDS[2:3], **options)[0])
    beams = model.generate(IDS, num_beams=3, **options)
    for row in range(4):
        assert torch.equal(both[row], model.generate(IDS[[row]], **options)[0])
        assert torch.equal(beams[row], model.generate(IDS[[row]], num_beams=3, **options)[0])


def test_rows_of_several_adapters() -> None:
    """Each row has its own adapter with its own invocation, or one without, or none."""
    model = adapted(adapter="a")
    adapted(model, "b", [5])
    adapted(model, "c", None)
    names = ["a", "b", "c", None]
    with route(model, names), torch.no_grad():
        output = logits(model)
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for row, name in enumerate(names):
        with using(model, name):
            assert torch.allclose(output[row], logits(model)[row], atol=1e-5)
            alone = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(tokens[row], alone[row])


@pytest.mark.filterwarnings("ignore")  # of the two kinds of checkpointing
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_with_two_calls_before_a_backward_pass(reentrant: bool | None) -> None:
    """Activations that are computed once more belong to the call whose output the gradient came through."""
    gradients = []
    for checkpointing in (False, reentrant is not None):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(IDS, labels=IDS).loss + 2 * model(IDS.flip(0), labels=IDS.flip(0)).loss
        (loss + model(IDS[1:3], labels=IDS[1:3]).loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for grad, other in zip(*gradients, strict=True):
        assert grad is not None and other is not None and torch.allclose(grad, other, atol=1e-6)


def test_rows_without_the_invocation_give_no_gradient() -> None:
    model = adapted().train()
    model(IDS[2:3], labels=IDS[2:3]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_copies_names_threads_and_failed_calls() -> None:
    model, expected = adapted(), logits(adapted())
    twin = copy.deepcopy(model)
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000)  # no such tokens: the call ends in the middle
    for other in (model, twin, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
    rename_adapter(model, "default", "first")
    copy_adapter(model, "first", "second")
    with using(model, "second"):
        assert torch.equal(logits(model), expected)
    results: dict[int, Tensor] = {}

    def run(row: int) -> None:
        results[row] = torch.cat([logits(model, IDS[[row]]) for _ in range(5)])

    threads = [threading.Thread(target=run, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row, result in results.items():
        assert torch.allclose(result, expected[row].expand_as(result), atol=1e-6)


class Twice(nn.Module):
    """A model that asks another one while it runs."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(100, 8), inner, nn.Linear(8, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        self.inner(input_ids.flip(1))
        return self.head(x)


def test_a_module_belongs_to_the_call_of_its_own_model() -> None:
    inner = adapted()
    model = Twice(nn.Identity())
    apply_rules(model, LoraRule("head", rank=2, init="random", invocation=CALL))
    expected = model(IDS)
    object.__setattr__(model, "inner", inner)
    assert torch.equal(model(IDS), expected)


def test_the_inner_model_finds_the_invocation_itself() -> None:
    model = adapted()
    hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.model(IDS).last_hidden_state, hidden)


def test_calls_whose_text_is_unknown() -> None:
    model, ids = adapted(), IDS
    embeds = base().get_input_embeddings()(ids)
    with pytest.warns(SurgeryWarning, match="inputs_embeds"):
        output = model(inputs_embeds=embeds).logits
    assert torch.equal(output, base()(inputs_embeds=embeds).logits)
    x = torch.randn(2, 3, 32)
    with pytest.warns(SurgeryWarning, match="outside of its model"):
        result = model.model.layers[0].mlp(x)
    assert torch.equal(result, base().model.layers[0].mlp(x))


@pytest.mark.slow("prompts and prefixes are compiled, and read positions, too")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, at a graph break
def test_compiled() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    compiled(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for grad, p in zip(gradients, [p for p in model.parameters() if p.requires_grad], strict=True):
        assert grad is not None and torch.allclose(grad, p.grad, atol=1e-5)


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    for bad in ([], [-1], "34", [1.5]):
        with pytest.raises(RuleError, match="invocation"):
            LoraRule("q_proj", invocation=bad)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="dora"):
        LoraRule("q_proj", invocation=CALL, dora=True)
    with pytest.raises(PlanError, match="map of each token"):
        apply_rules(base(), LoraRule("embed_tokens", invocation=CALL))
    plan = plan_rules(base("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48), LoraRule("q", invocation=CALL))
    assert "an encoder beside the decoder" in str(plan)
    model = adapted()
    adapted(model, "other", [5])
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="depends on the text"):
        merge(model, "default")
    with pytest.raises(SurgeryError, match="same invocation"):
        combine(model, {"default": 1, "other": 1}, "both")
    with pytest.raises(SurgeryError):
        export_onnx(model, tmp_path / "file.onnx", (IDS,))
    assert not before.differences(model)


def test_combined_and_saved(tmp_path: Path) -> None:
    model, expected = adapted(adapter="a"), logits(adapted())
    copy_adapter(model, "a", "b")
    combine(model, {"a": 0.25, "b": 0.75}, "both")
    with using(model, "both"):
        assert torch.allclose(logits(model), expected, atol=1e-4)
    for form in ("peft", "surgery"):
        save_adapter(model, tmp_path / form, "a", format=form)
        loaded = base()
        load_adapter(loaded, tmp_path / form)
        assert torch.equal(logits(loaded), expected) and active(loaded) == ("default",)
        (rule,) = rules_of(loaded)
        assert isinstance(rule, LoraRule) and rule.invocation == (3, 4)


def test_maps_that_see_all_tokens_in_one_axis() -> None:
    """A module may flatten (rows, tokens), and a head may look at the last tokens alone."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.pool = nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(input_ids)
            flat = self.up(x.flatten(0, 1)).view_as(x)
            return flat, self.pool(flat[:, -1])

    torch.manual_seed(0)
    model = Flat()
    plain = model(IDS)
    apply_rules(model, LoraRule(["up", "pool"], rank=2, init="random", invocation=CALL))
    flat, pooled = model(IDS)
    for row, begin in enumerate(BEGINS):
        assert torch.equal(flat[row, :begin], plain[0][row, :begin])
        assert begin == 6 or not torch.isclose(flat[row, begin:], plain[0][row, begin:]).all(-1).any()
    assert torch.equal(pooled[2], plain[1][2]) and not torch.allclose(pooled[0], plain[1][0])
    with pytest.raises(SiteError, match="which tokens"):
        Broken = type("Broken", (Flat,), {"forward": lambda self, input_ids: self.up(self.embed(input_ids)[0, :5])})
        broken = Broken()
        apply_rules(broken, LoraRule("up", invocation=CALL))
        broken(IDS)
