"""Every verb on a model with structural rules: it does what it says, or is refused with the model unchanged."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import (
    LoadError,
    MergeError,
    SurgeryError,
    SurgeryWarning,
    activate,
    active,
    adapter_state_dict,
    adapters,
    apply_rules,
    base_state_dict,
    combine,
    commit,
    copy_adapter,
    deactivate,
    draw,
    forget,
    hotswap,
    merge,
    pad_rank,
    plan_rules,
    remove,
    rename_adapter,
    report,
    route,
    rules_of,
    save_adapter,
    show,
    summary,
    unmerge,
    using,
)
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.stack import stack

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))


def lora(**fields: Any) -> LoraRule:
    return LoraRule("q_proj", rank=2, init="random", **fields)


def three() -> Any:
    """LoRA from before a cut, the cut alone, and an adapter with a cut and LoRA."""
    model = apply_rules(stack(), lora(), adapter="a")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    return apply_rules(model, [DropRule("model.layers.0"), lora()], adapter="mix")


def run(model: Any) -> torch.Tensor:
    return model(IDS).logits


def refused(model: Any, match: str, call: Callable[[Any], Any]) -> str:
    before = Snapshot(model)
    with pytest.raises((SurgeryError, LoadError), match=match) as error:
        call(model)
    assert before.differences(model) == []
    return str(error.value)


# Looking ----------------------------------------------------------------------------------------------------------


def test_what_is_told() -> None:
    model = three()
    table = adapters(model)
    assert active(model) == ("a", "cut", "mix") and table["cut"].sites == () and table["cut"].live
    text = str(summary(model))
    assert "cut      DropRule      1      0          0  live" in text and "mix      LoraRule" in text
    assert summary(model).to_rows()[0] == {
        "adapter": "cut", "rule": "DropRule", "sites": 1, "added": 0, "trainable": 0, "state": "live",
    }  # fmt: skip
    assert "LoraRule" in str(show(model, "model.layers.0.self_attn.q_proj"))
    assert "<svg" in str(draw(model))
    assert [r.label for r in rules_of(model, "mix")] == ["DropRule", "LoraRule"]
    plan = plan_rules(model, RepeatRule("model.layers", times=2), adapter="deep")
    assert plan and "2 → 4 layers" in str(plan) and len(model.model.layers) == 2


def test_a_report(tmp_path: Path) -> None:
    model = three()
    before = Snapshot(model)
    report(model, tmp_path / "page.html", example_inputs=IDS)
    assert "DropRule" in (tmp_path / "page.html").read_text() and before.differences(model) == []


# Live and idle ----------------------------------------------------------------------------------------------------


def test_a_structure_is_always_in_force() -> None:
    model = three()
    wanted = run(model)
    deactivate(model)
    assert active(model) == ("cut",) and len(model.model.layers) == 2
    base = apply_rules(apply_rules(stack(), DropRule("model.layers.1")), DropRule("model.layers.0"), adapter="b")
    assert torch.equal(run(model), run(base))
    activate(model)
    assert active(model) == ("a", "cut", "mix") and torch.equal(run(model), wanted)
    activate(model, "mix", weights=0.5)
    assert active(model) == ("cut", "mix")
    activate(model, active(model))
    activate(model, ["a", "mix"])
    with using(model, None):
        assert active(model) == ("cut",)
    with using(model, "cut"):
        assert active(model) == ("cut",)
    assert active(model) == ("a", "cut", "mix") and torch.equal(run(model), wanted)
    refused(model, "'cut' can't have a weight", lambda m: activate(m, ["a", "cut"], weights={"cut": 0.5}))
    only = apply_rules(stack(), DropRule("model.layers.1"), adapter="cut")
    refused(only, "'cut' can't be made idle", deactivate)
    with using(only, None):
        assert active(only) == ("cut",)


def test_idle_adapters_on_layers_that_come_back() -> None:
    """A layer that was set aside follows its adapter: idle, live, and whether it trains."""
    model = apply_rules(stack(), lora(), adapter="a")
    plain, wanted = Snapshot(model), run(model)
    idle = run(deactivate(model))
    activate(model)
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    deactivate(model)
    remove(model, "cut")
    assert active(model) == () and torch.equal(run(model), idle)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    activate(model, "a")
    remove(model, "cut")
    assert torch.equal(run(model), wanted) and plain.differences(model) == []
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    activate(model, "a", train=False)
    remove(model, "cut")
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Merging ----------------------------------------------------------------------------------------------------------


def test_merge_and_unmerge_leave_the_structure() -> None:
    model = three()
    wanted = run(model)
    before = Snapshot(model)
    assert merge(model).adapters == ("a", "mix")
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-4)
    refused(model, "the model is merged", lambda m: remove(m, "mix"))
    unmerge(model)
    assert before.differences(model) == [] and torch.equal(run(model), wanted)
    refused(model, r"'cut' can't be merged(.|\n)*commit\(model\)", lambda m: merge(m, "cut"))
    with pytest.raises(MergeError):
        merge(model, ["a", "cut"])
    merge(model)
    refused(model, r"'a' can't be forgotten(.|\n)*DropRule \[(cut|mix)\] took out(.|\n)*commit", forget)
    commit(model)
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-4)


def test_forget_after_a_structure() -> None:
    model = apply_rules(stack(), DropRule("model.layers.1"), adapter="cut")
    cut = Snapshot(model)
    apply_rules(model, lora(), adapter="a")
    wanted = run(model)
    merge(model)
    forget(model)
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-4)
    assert list(adapters(model)) == ["cut"]
    assert not [line for line in cut.differences(model) if "bits of" not in line]
    remove(model)
    assert len(model.model.layers) == 4


def test_forgetting_needs_a_commit_where_the_merged_adapter_has_a_structure() -> None:
    model = apply_rules(stack(), [DropRule("model.layers.1"), lora()], adapter="mix")
    merge(model)
    wanted = run(model)
    refused(model, r"DropRule changed the structure(.|\n)*commit\(model, 'mix'\)", forget)
    commit(model, "mix")
    assert torch.equal(run(model), wanted) and len(model.model.layers) == 3


# Names, copies, combinations, other tensors -----------------------------------------------------------------------


def test_renaming_follows_layers_that_were_set_aside() -> None:
    model = three()
    wanted, base = run(model), Snapshot(stack()).bits
    rename_adapter(model, "a", "new")
    rename_adapter(model, "cut", "shorter")
    rename_adapter(model, "mix", "both")
    assert torch.equal(run(model), wanted) and active(model) == ("new", "shorter", "both")
    remove(model, ["both", "shorter"])
    assert adapters(model)["new"].sites == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(4))
    remove(model, "new")
    tensors = model.state_dict()
    assert all(torch.equal(tensors[name], stack().state_dict()[name]) for name in tensors) and base
    assert not [key for module in model.modules() for key in vars(module) if "surgery" in key]


def test_copies_and_combinations_are_of_edits_alone() -> None:
    model = three()
    refused(model, "'cut' can't be copied", lambda m: copy_adapter(m, "cut", "b"))
    refused(model, "'cut' can't be combined", lambda m: combine(m, {"a": 1.0, "cut": 1.0}, "b"))
    copy_adapter(model, "mix", "b")
    assert [r.label for r in rules_of(model, "b")] == ["LoraRule"] and not adapters(model)["b"].live
    with pytest.warns(SurgeryWarning, match=r"'c' is not on layers that DropRule \[cut\], DropRule \[mix\] took out"):
        combine(model, {"a": 1.0, "mix": 1.0}, "c")
    with pytest.warns(SurgeryWarning, match="'d' is not on layers"):
        copy_adapter(model, "a", "d")
    both = run(activate(model, ["a", "mix"]))
    torch.testing.assert_close(run(activate(model, "c")), both, atol=1e-5, rtol=1e-4)
    assert torch.equal(run(activate(model, "b")), run(activate(model, "mix")))
    remove(model, ["mix", "cut"])
    assert len(model.model.layers) == 4 and adapters(model)["c"].sites[0] == "model.layers.2.self_attn.q_proj"
    remove(model)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in stack().state_dict().items())


def test_other_tensors(tmp_path: Path) -> None:
    model = three()
    refused(model, "'a' can't be swapped or padded(.|\n)*took out", lambda m: pad_rank(m, "a", 8))
    refused(model, "'a' can't be swapped", lambda m: hotswap(m, "a", adapter_state_dict(m, "a")))
    pad_rank(model, "mix", 4)
    remove(model)

    def cut(*rules: Any) -> Any:
        return apply_rules(stack(), [*rules, lora()], adapter="m")

    live, source, other = cut(DropRule("model.layers.0")), cut(DropRule("model.layers.0")), cut()
    torch.nn.init.normal_(source.model.layers[0].self_attn.q_proj.adapters.m.B)
    save_adapter(source, tmp_path / "same", "m")
    save_adapter(cut(DropRule("model.layers.1")), tmp_path / "other", "m")
    hotswap(live, "m", tmp_path / "same")
    assert torch.equal(run(live), run(source))
    refused(live, "can't change the structure", lambda m: hotswap(m, "m", tmp_path / "other"))
    refused(other, "can't change the structure", lambda m: hotswap(m, "m", tmp_path / "same"))


def test_routing() -> None:
    model = three()
    refused(model, "'cut' can't be routed", lambda m: route(m, ["cut", None]).__enter__())
    with route(model, ["a", "mix"]):
        rows = run(model)
    for row, name in enumerate(("a", "mix")):
        with using(model, name):
            torch.testing.assert_close(rows[row], run(model)[row], atol=1e-5, rtol=1e-4)
    with route(model, ["a", "mix"]):
        refused(model, "routed", lambda m: apply_rules(m, DropRule("model.layers.0"), adapter="x"))
        refused(model, "routed", lambda m: remove(m, "mix"))
        refused(model, "routed|block", commit)


# Copies of the model, and removal in any order ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model(how: str) -> None:
    model = three()
    before, wanted = Snapshot(model), run(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(run(other), wanted) and active(other) == active(model)
    remove(other, ["mix", "cut"])
    assert adapters(other)["a"].sites == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(4))
    remove(other)
    assert torch.equal(run(other), run(stack())) and before.differences(model) == []
    deep = apply_rules(stack(), [RepeatRule("model.layers", order=[0, 1, 1, 2], shared=True), lora()])
    second = copy.deepcopy(deep)
    assert torch.equal(run(second), run(deep))
    assert second.model.layers[1].mlp.up_proj.weight is second.model.layers[2].mlp.up_proj.weight
    refused(second, "would change another module", commit)
    merge(second, untie=True)
    commit(second)
    assert torch.allclose(run(second), run(deep), atol=1e-5)


@pytest.mark.parametrize("order", list(itertools.permutations(["a", "cut", "mix"])), ids="-".join)
@pytest.mark.parametrize("check", [True, False])
def test_removal_in_any_order(order: tuple[str, ...], check: bool) -> None:
    base = stack()
    plain = Snapshot(base)
    model = apply_rules(base, lora(), adapter="a")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    apply_rules(model, [ReorderRule("model.layers", order=[2, 0, 1]), lora()], adapter="mix")
    for name in order:
        if name == "cut" and "mix" in adapters(model):
            refused(model, r"ReorderRule \[mix\] changed it since", lambda m: remove(m, "cut", check=check))
            continue
        remove(model, name, check=check)
    if order.index("cut") < order.index("mix"):
        remove(model, check=check)
    assert plain.differences(base) == []


@pytest.mark.parametrize("names", [["a", "cut"], ["cut", "mix"], None], ids=str)
def test_several_removed_at_once(names: list[str] | None) -> None:
    base = stack()
    plain = Snapshot(base)
    model = apply_rules(base, lora(), adapter="a")
    apply_rules(model, [DropRule("model.layers.1"), lora()], adapter="mix")
    apply_rules(model, DropRule("model.layers.0"), adapter="cut")
    refused(model, r"DropRule \[cut\] changed it since", lambda m: remove(m, ["mix", "a"]))
    remove(model, names)
    if names is not None:
        remove(model)
    assert plain.differences(base) == []


def test_state_dicts() -> None:
    model = three()
    assert all(".1." in key or ".0." in key for key in adapter_state_dict(model, "a"))
    assert adapter_state_dict(model, "cut") == {}
    assert not any("layers.2" in key for key in base_state_dict(model))
    other = three()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))
