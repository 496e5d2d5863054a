"""Renamed and copied adapters: equal Parameters, order and bits; independent copies; each sequence can be undone."""

from __future__ import annotations

import copy
import io
import os
import random
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import (
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    active,
    adapter_state_dict,
    adapters,
    apply_rules,
    combine,
    copy_adapter,
    deactivate,
    load_adapter,
    merge,
    remove,
    rename_adapter,
    route,
    rules_of,
    save_adapter,
    show,
    unmerge,
    using,
)
from surgery.rules import (
    BiasRule,
    CaptureRule,
    IA3Rule,
    LoraRule,
    NormRule,
    PrefixRule,
    PromptRule,
    TokensRule,
    TrainRule,
    captured,
)
from surgery.testing import Snapshot
from tests.support.tiny import llama
from tests.support.written_attention import Plain

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
X = torch.randn(3, 8)


def three() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for index, name in enumerate("abc"):
        targets = ["0", "2"] if index % 2 == 0 else ["0"]
        apply_rules(model, LoraRule(targets, rank=2 + index, alpha=4, init="random"), adapter=name)
    return model


def revived(model: nn.Module) -> nn.Module:
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


# Renaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [("a", "b", "c"), ("b",), ("a", "c"), ()])
def test_all_but_the_name_stays(live: tuple[str, ...]) -> None:
    model = three()
    activate(model, list(live), weights=[0.5] * len(live)) if live else deactivate(model)
    parameters, before, snapshot = dict(model.named_parameters()), model(X), Snapshot(model)
    optimizer = torch.optim.Adam(parameters.values())
    rename_adapter(model, "b", "new")
    assert list(adapters(model)) == ["a", "new", "c"] and list(active(model)) == [n.replace("b", "new") for n in live]
    assert adapters(model)["new"].weight == (0.5 if "b" in live else 1.0) and rules_of(model, "new")[0].rank == 3  # type: ignore[attr-defined]
    wanted = [key.replace(".b.", ".new.") for key in parameters]
    assert [key for key, _ in model.named_parameters()] == wanted
    for key, parameter in model.named_parameters():
        old = parameters[key.replace(".new.", ".b.")]
        assert parameter is old and parameter.requires_grad == old.requires_grad
    assert torch.equal(model(X), before)
    assert not live or ("adapters.b" not in show(model, "0") and "[b]" not in show(model, "0"))
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in model.parameters())
    activate(model, "new")
    activate(model, "a")
    activate(model, list(n.replace("b", "new") for n in live), weights=[0.5] * len(live)) if live else deactivate(model)
    assert torch.equal(model(X), before)
    apply_rules(model, LoraRule("0", rank=1), adapter="b")  # the old name is free
    remove(model, "b")
    activate(model, list(n.replace("b", "new") for n in live), weights=[0.5] * len(live)) if live else deactivate(model)
    rename_adapter(model, "new", "b")
    different = [line for line in snapshot.differences(model) if "class of" not in line]
    assert different == [] and torch.equal(model(X), before)


def test_names_change_places() -> None:
    model = three()
    alone = {name: activate(model, name)(X) for name in "ab"}
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        rename_adapter(model, old, new)
    assert torch.equal(activate(model, "a")(X), alone["b"]) and torch.equal(activate(model, "b")(X), alone["a"])
    assert list(adapters(model)) == ["b", "a", "c"]


def test_while_merged() -> None:
    model = three()
    activate(model, ["a", "b"])
    live = model(X)
    merge(model)
    merged = model(X)
    rename_adapter(model, "b", "new")
    rename_adapter(model, "c", "idle")
    assert [(n, adapter.merged, adapter.live) for n, adapter in adapters(model).items()] == [
        ("a", True, True), ("new", True, True), ("idle", False, False),
    ]  # fmt: skip
    assert torch.equal(model(X), merged)
    copy_adapter(model, "new", "more")
    assert torch.equal(unmerge(model)(X), live) and active(model) == ("a", "new")
    assert torch.equal(activate(model, ["a", "more"])(X), live)
    plain = remove(copy.deepcopy(model))
    assert torch.equal(plain(X), deactivate(model)(X))


def test_a_rule_that_wrote_its_adapter_down_and_one_inside_a_forward() -> None:
    model, x = Plain().eval(), torch.randn(2, 5, 12)
    for name in ("a", "b"):
        apply_rules(model, [PrefixRule(length=2), CaptureRule("", what="input")], adapter=name, example_inputs=x)
    before = model(x)[0]
    rename_adapter(model, "a", "new")
    assert torch.equal(model(x)[0], before)
    with captured(model) as captures:
        model(x)
    assert captures
    twin = rename_adapter(copy.deepcopy(model), "b", "other")
    assert torch.equal(twin(x)[0], before) and torch.equal(revived(twin)(x)[0], before)
    copy_adapter(twin, "other", "third")
    assert torch.equal(activate(twin, ["new", "third"])(x)[0], before)
    remove(twin, ["new", "other"])
    assert torch.equal(twin(x)[0], activate(model, "b")(x)[0])


@torch.no_grad()
def test_a_filled_cache_knows_a_renamed_prompt() -> None:
    model, inputs = llama()
    model.eval()
    apply_rules(model, PromptRule(length=3), adapter="a")
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    first, second = copy.deepcopy(cache), copy.deepcopy(cache)
    rename_adapter(model, "a", "b")
    step = {"input_ids": ids[:, -1:], "attention_mask": mask}
    torch.testing.assert_close(model(**step, past_key_values=cache).logits[:, -1], expected, **CLOSE)
    apply_rules(remove(copy.deepcopy(model)), PromptRule(length=3), adapter="a")  # another adapter with the old name
    torch.testing.assert_close(revived(model)(**step, past_key_values=first).logits[:, -1], expected, **CLOSE)
    copy_adapter(model, "b", "c")
    activate(model, "c")
    with pytest.raises(SurgeryError, match="virtual tokens"):  # the cache has b's virtual tokens
        model(**step, past_key_values=second)
    activate(model, ["b", "c"])
    both = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    torch.testing.assert_close(model(**step, past_key_values=cache).logits[:, -1], both, **CLOSE)


def test_save_pretrained_leaves_renamed_and_copied_out(tmp_path: Any) -> None:
    model, _ = llama()
    before, keys = Snapshot(model), set(model.state_dict())
    apply_rules(model, LoraRule(["q_proj"], rank=2), adapter="a")
    rename_adapter(model, "a", "b")
    copy_adapter(model, "b", "c")
    with pytest.warns(SurgeryWarning, match="leaves out its adapters"):
        cast(Any, model).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= keys
    remove(model)
    assert before.differences(model) == []


def test_saved_under_the_new_name(tmp_path: Any) -> None:
    model = three()
    activate(model, "a")
    before = model(X)
    rename_adapter(model, "a", "new")
    for format in ("peft", "surgery"):
        folder = save_adapter(model, tmp_path / format, "new", format=cast(Any, format))
        plain = remove(copy.deepcopy(model))
        load_adapter(plain, folder)
        assert torch.equal(plain(X), before)


def test_renaming_is_refused() -> None:
    model = three()
    before = Snapshot(model)
    for old, new, message in (
        ("d", "e", "no adapter"), ("a", "b", "already"), ("a", "x.y", "can't name"), ("a", "", "can't name"),
        ("a", "train", "can't name"), (["a"], "x", "is not the name of an adapter"), ("a", 3, "can't name"),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match=message):
            rename_adapter(model, cast(Any, old), cast(Any, new))
    with using(model, "a"), pytest.raises(SurgeryError, match=r"using(.|\n)*leave the block"):
        rename_adapter(model, "a", "x")
    with pytest.raises(SurgeryError, match="no rules were applied"):
        rename_adapter(nn.Linear(2, 2), "a", "b")
    assert rename_adapter(model, "a", "a") is model and before.differences(model) == []


@pytest.mark.parametrize("name", ["class", "None", 'a"', "a\\", "a\nb", "a\u2028b"])
def test_names_that_generated_code_can_not_hold(name: str) -> None:
    model, plain = three(), nn.Sequential(nn.Linear(8, 8))
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="can't name"):
        rename_adapter(model, "a", name)
    with pytest.raises(SurgeryError, match="can't name"):
        copy_adapter(model, "a", name)
    with pytest.raises(SurgeryError, match="can't name"):
        apply_rules(plain, LoraRule("0"), adapter=name)
    assert before.differences(model) == [] and not vars(plain).get("_surgery_model")


@pytest.mark.parametrize("name", ["a b", "1", "it's", "é", "a-b", "#", "{x}", "print(1)"])
def test_names_that_it_can(name: str) -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2, init="random"), adapter=name)
    adapter: Any = model[0].adapters._modules[name]  # type: ignore[union-attr]
    wanted = torch.nn.functional.linear(X, model[0].weight + 4 * adapter.B @ adapter.A, model[0].bias)  # type: ignore[union-attr]
    torch.testing.assert_close(model(X), wanted)


def test_a_failed_renaming_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = three()
    before, output, calls = Snapshot(model), model(X), 0
    rewrite = LoraRule.rewrite

    def failing(self: Any, site: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("no")
        return rewrite(self, site)

    monkeypatch.setattr(LoraRule, "rewrite", failing)
    with pytest.raises(SurgeryError):
        rename_adapter(model, "a", "new")
    assert before.differences(model) == [] and list(adapters(model)) == ["a", "b", "c"]
    monkeypatch.undo()
    assert torch.equal(model(X), output)
    assert torch.equal(rename_adapter(model, "a", "new")(X), output)


def test_training_goes_on() -> None:
    def train(rename: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = three()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(4):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
            if rename and step == 1:
                rename_adapter(model, "a", "new")
        return list(model.parameters())

    assert all(torch.equal(expected, actual) for expected, actual in zip(train(False), train(True), strict=True))


# Copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, revived], ids=["itself", "deepcopy", "pickle"])
def test_a_copy_is_equal_and_goes_its_own_way(how: Any) -> None:
    model = three()
    model.get_parameter("0.adapters.a.A").requires_grad_(False)
    model = how(model)
    activate(model, "a")
    alone = model(X)
    state = torch.get_rng_state()
    assert copy_adapter(model, "a", "copy") is model and torch.equal(torch.get_rng_state(), state)
    assert active(model) == ("a",) and torch.equal(model(X), alone) and rules_of(model, "copy") == rules_of(model, "a")
    assert torch.equal(activate(model, "copy")(X), alone)
    flags = {n: p.requires_grad for n, p in model.named_parameters() if ".copy." in n}
    assert flags == {f"{k.replace('.a.', '.copy.')}": k != "0.adapters.a.A" for k in
                     ("0.adapters.a.A", "0.adapters.a.B", "2.adapters.a.A", "2.adapters.a.B")}  # fmt: skip
    with torch.no_grad():
        model.get_parameter("0.adapters.copy.B").add_(1.0)
    assert not torch.equal(model(X), alone) and torch.equal(activate(model, "a")(X), alone)
    copy_adapter(model, "b", "idle")  # b is idle, so its record has the flags for later
    activate(model, "idle")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".idle." in n)
    remove(model, "a")
    assert not any(".a." in key for key in model.state_dict()) and "copy" in adapters(model)


def test_every_sort_of_tensor_is_copied_in_its_dtype() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)).to(torch.bfloat16).eval()
    rules = [TokensRule("0", tokens=[3, 1]), LoraRule("1", rank=2, init="random"), NormRule()]
    apply_rules(model, rules, adapter="a")
    model.to(torch.bfloat16)  # the adapter was created in float32
    copy_adapter(model, "a", "b")
    copies, wanted = adapter_state_dict(model, "b"), adapter_state_dict(model, "a")
    assert copies.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(copies[key], tensor) and copies[key].dtype == tensor.dtype
        assert copies[key].data_ptr() != tensor.data_ptr()
    buffers = {key for key, _ in model.named_buffers()}
    assert {k.replace(".b.", ".a.") for k in buffers if ".b." in k} == {k for k in buffers if ".a." in k}
    x = torch.tensor([1, 3, 5])
    deactivate(model)
    before = activate(model, "a")(x)
    assert torch.equal(activate(model, "b")(x), before)


def test_copies_need_no_example() -> None:
    model, inputs = llama()
    model.eval()
    apply_rules(model, [PromptRule(length=2), PrefixRule(length=3)], adapter="a", example_inputs=inputs)
    before = model(**inputs).logits
    for other in (model, copy.deepcopy(model), revived(model)):
        copy_adapter(other, "a", "b")
        assert torch.equal(activate(other, "b")(**inputs).logits, before)
        remove(other, "a")
        assert torch.equal(other(**inputs).logits, before)


def test_copying_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_rules(model, LoraRule("0", rank=2, init="pissa"), adapter="p")
    apply_rules(model, LoraRule("0", rank=2), adapter="q")
    before = Snapshot(model)
    for old, new, message in (
        ("p", "r", r"changed the base's weights(.|\n)*init="), ("x", "r", "no adapter"), ("q", "p", "already"),
        ("q", "q", "already"), ("q", "a.b", "can't name"),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match=message):
            copy_adapter(model, old, new)
    assert before.differences(model) == []


def test_a_second_head_hides_no_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    for name in ("a", "b"):
        apply_rules(model, [LoraRule("0", rank=2, init="random"), TrainRule("1")], adapter=name)
        with torch.no_grad():
            model.get_parameter(f"1.adapters.{name}.weight").add_(torch.randn(2, 8))
        if name == "a":
            with pytest.raises(SurgeryError, match=r"both replace(.|\n)*deactivate") as error:
                apply_rules(model, TrainRule("1"), adapter="b")
            told = "TrainRule [b] and TrainRule [a] both replace weight and bias"
            assert str(error.value).startswith(told)  # one problem for both
            first = model(X)
            deactivate(model)
    second = model(X)
    with pytest.raises(SurgeryError, match=r"can't be live together(.|\n)*combine") as error:
        activate(model, ["a", "b"])
    assert "both replace weight and bias" in str(error.value)
    assert active(model) == ("b",) and torch.equal(model(X), second)
    assert torch.equal(activate(model, "a")(X), first)
    with pytest.raises(SurgeryError, match="can't be live together"):
        merge(model, ["a", "b"])
    merge(model)  # the idle copy is not merged
    torch.testing.assert_close(model(X), first, **CLOSE)
    assert torch.equal(unmerge(model)(X), first)


def test_rows_go_to_renamed_and_copied_adapters() -> None:
    model = three()
    apply_rules(model, IA3Rule("2", init="random"), adapter="x")
    copy_adapter(model, "x", "copy")
    with torch.no_grad():
        with route(model, ["a", "copy", None]):
            rows = model(X)
            with pytest.raises(SurgeryError, match="routed"):
                rename_adapter(model, "a", "new")
        rename_adapter(model, "a", "new")
        rename_adapter(model, "copy", "other")
        names = ["new", "other", None]
        for index, name in enumerate(names):
            with using(model, name):
                torch.testing.assert_close(rows[index], model(X)[index], **CLOSE)
        with route(model, names):
            torch.testing.assert_close(model(X), rows, **CLOSE)


def test_two_heads_serve_two_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    apply_rules(model, TrainRule("1"), adapter="a")
    copy_adapter(model, "a", "b")
    with torch.no_grad():
        model.get_parameter("1.adapters.b.weight").add_(1.0)
        alone = [activate(model, name)(X) for name in "ab"]
        with route(model, ["a", "b", "b"]):
            output = model(X)
    torch.testing.assert_close(output, torch.stack([alone[0][0], alone[1][1], alone[1][2]]), **CLOSE)


def test_idle_rules_bar_no_merge() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    for name in "ab":
        apply_rules(model, IA3Rule("0", init="random"), adapter=name)
    live = activate(model, "b")(X)
    merge(model)
    torch.testing.assert_close(model(X), live, **CLOSE)
    assert torch.equal(unmerge(model)(X), live)
    activate(model, ["a", "b"])
    with pytest.raises(SurgeryError, match="part of a stack"):
        merge(model, "a")


# Every sequence -----------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "120"))


def random_model(draw: random.Random) -> nn.Module:
    torch.manual_seed(draw.randrange(2**31))
    parts: list[nn.Module] = [nn.Embedding(9, 6)]
    for _ in range(draw.randint(1, 3)):
        parts += draw.choice([[nn.Linear(6, 6)], [nn.LayerNorm(6), nn.Linear(6, 6)], [nn.Linear(6, 6), nn.Tanh()]])
    model = nn.Sequential(*parts).to(draw.choice([torch.float32, torch.float64, torch.bfloat16]))
    for parameter in model.parameters():
        parameter.requires_grad_(draw.random() < 0.7)
    return model.eval()


def random_rules(draw: random.Random) -> list[Rule]:
    lora = LoraRule(
        draw.choice([nn.Linear, [nn.Linear, nn.Embedding]]),
        exclude=["1"] if draw.random() < 0.2 else (),
        rank=draw.choice([1, 2]),
        alpha=draw.choice([1, 3]),
        dora=draw.random() < 0.2,
        init="random",
    )
    others: list[Rule] = [
        IA3Rule([nn.Linear], init="random"),
        TokensRule("0", tokens=[draw.randrange(4), 5]),
        BiasRule(),
    ]
    return draw.sample([lora, *others], draw.choice([1, 1, 2]))


@settings(
    max_examples=max(40, EXAMPLES // 3), deadline=None, derandomize=True, print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.integers(0, 2**32))
def test_any_sequence_leaves_the_base_as_it_was(seed: int) -> None:
    draw = random.Random(seed)
    model, ids = random_model(draw), torch.arange(9)
    before, plain = Snapshot(model), model(ids)
    known: dict[str, Tensor] = {}  # the output with each adapter alone
    numbers = iter(range(100))
    for _ in range(draw.randint(2, 8)):
        names, new, x = list(known), f"n{next(numbers)}", draw.random()
        try:
            if not names or x < 0.25:
                if names:
                    deactivate(model)
                apply_rules(model, random_rules(draw), adapter=new)
                known[new] = activate(model, new)(ids)
            elif x < 0.45:
                old = draw.choice(names)
                now = model(ids)
                rename_adapter(model, old, new)
                assert torch.equal(model(ids), now)
                known = {new if name == old else name: value for name, value in known.items()}
            elif x < 0.6:
                now = model(ids)
                copy_adapter(model, draw.choice(names), new)
                known[new] = known[rules_origin(model, new, names)]
                assert torch.equal(model(ids), now)
            elif x < 0.8:
                chosen = {name: draw.choice([-0.5, 0.3, 1.0]) for name in draw.sample(names, min(2, len(names)))}
                method: Any = draw.choice(["linear", "cat", "svd", "ties", "dare_ties_svd"])
                now, within = model(ids), Snapshot(model)
                try:
                    combine(model, chosen, new, method, density=0.6 if "ties" in method else None)
                except SurgeryError:
                    assert within.differences(model) == []
                    continue
                assert torch.equal(model(ids), now)
                known[new] = activate(model, new)(ids)
            elif x < 0.9:
                live = model(ids)
                merge(model)
                old = draw.choice(names)
                rename_adapter(model, old, new)
                known = {new if name == old else name: value for name, value in known.items()}
                assert torch.equal(unmerge(model)(ids), live)
            else:
                gone = draw.choice(names)
                remove(model, gone)
                del known[gone]
        except SurgeryError as error:
            assert "merge" in str(error) or "matches nothing" in str(error) or "live together" in str(error), error
        assert list(adapters(model)) == list(known) if known else True
        for name, value in known.items():
            assert torch.equal(activate(model, name)(ids), value), name
    if known:
        remove(model)
    assert before.differences(model) == [] and torch.equal(model(ids), plain)


def rules_origin(model: nn.Module, new: str, names: list[str]) -> str:
    """The adapter with the tensors of a copy."""
    mine = adapter_state_dict(model, new)
    return next(
        name for name in names
        if (tensors := adapter_state_dict(model, name)).keys() == mine.keys()
        and all(torch.equal(tensors[key], mine[key]) for key in mine) and rules_of(model, name) == rules_of(model, new)
    )  # fmt: skip


def test_a_merged_adapter_is_renamed_at_the_sites_of_those_merged_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="a")
    apply_rules(model, LoraRule(["0", "1"], rank=2, init="random"), adapter="b")
    merge(model)
    rename_adapter(model, "a", "c")
    copy_adapter(model, "b", "a")
    assert {name: adapter.merged for name, adapter in adapters(model).items()} == {"c": True, "b": True, "a": False}
    with pytest.warns(SurgeryWarning, match="merged already: nothing happens"):
        merge(model)
    assert active(unmerge(model)) == ("c", "b")
