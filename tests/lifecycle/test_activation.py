"""Live adapters: outputs equal plain arithmetic, the base's bits come back, and the right parameters train."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    SurgeryError,
    activate,
    active,
    adapters,
    apply_rules,
    base_state_dict,
    class_of,
    copy_adapter,
    deactivate,
    merge,
    pad_rank,
    remove,
    rename_adapter,
    route,
    summary,
    unmerge,
    using,
)
from surgery.lifecycle.switching import set_trained
from surgery.rules import IA3Rule, LoraRule, PrefixRule, SteerRule
from surgery.testing import Snapshot
from tests.support.written_attention import Plain

X = torch.randn(3, 8)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def model_with(*names: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for index, name in enumerate(names):
        targets = ["0", "2"] if index % 2 == 0 else ["0"]  # the last layer does not have all adapters
        apply_rules(model, LoraRule(targets, rank=2 + index, alpha=4, init="random"), adapter=name)
    return model


def list_trained(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.requires_grad}


def compute_expected(model: nn.Module, *names: str) -> Tensor:
    x = X
    for layer in model:  # type: ignore[union-attr]
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        weight = layer.weight
        for name in names:
            box: Any = layer.adapters._modules.get(name)  # type: ignore[union-attr]
            if box is not None:
                weight = weight + box.B @ box.A * (4 / box.A.shape[0])
        x = nn.functional.linear(x, weight, layer.bias)
    return x


def test_the_live_ones_count() -> None:
    model = model_with("a", "b", "c")
    plain = compute_expected(model)
    assert active(model) == ("a", "b", "c")
    for names in (["a"], ["b"], ["c", "a"], ["b", "c"], [], ["a", "b", "c"]):
        activate(model, names)
        torch.testing.assert_close(model(X), compute_expected(model, *names), **CLOSE)
        assert set(active(model)) == set(names)
        for key, parameter in model.named_parameters():
            owner = key.split(".")[-2] if "adapters" in key else None
            assert parameter.requires_grad == (owner in names), key
    deactivate(model)
    assert torch.equal(model(X), plain) and all(class_of(m) is type(m) for m in model.modules())
    activate(model, "b")
    assert type(model.get_submodule("2")) is nn.Linear  # the layer does not have adapter b
    adapters_by_name = adapters(model)
    assert (
        adapters_by_name["b"].live
        and not adapters_by_name["a"].live
        and adapters_by_name["a"].sites == ("0", "2")
        and adapters_by_name["b"].sites == ("0",)
    )


def test_using_restores_also_after_errors() -> None:
    model = model_with("a", "b")
    activate(model, "a")
    before = model(X)
    with pytest.raises(ValueError), using(model, "b"):
        torch.testing.assert_close(model(X), compute_expected(model, "b"), **CLOSE)
        with using(model, None):
            assert active(model) == ()
        assert active(model) == ("b",)
        raise ValueError
    assert active(model) == ("a",) and torch.equal(model(X), before)


def test_an_idle_adapter_that_is_merged_counts_all_the_same() -> None:
    """The base's weights contain PiSSA's change, so the base and other adapters alone need it taken out first."""
    model = model_with("a", "b")
    deactivate(model)
    plain = model(X)
    merge(model, "a")
    before, merged = Snapshot(model), model(X)
    assert not torch.equal(plain, merged)
    with pytest.raises(SurgeryError, match="unmerge"), using(model, None):
        pass
    with pytest.raises(SurgeryError, match="unmerge"), route(model, [None] * len(X)):
        pass
    for name in ("a", "b"):
        with pytest.raises(SurgeryError, match="unmerge"):
            activate(model, name)
    with pytest.raises(SurgeryError, match="unmerge"):
        deactivate(model)
    assert before.differences(model) == [] and torch.equal(model(X), merged)
    assert torch.equal(unmerge(model)(X), plain)


def test_all_adapters_are_removed_inside_of_using() -> None:
    model = model_with("a", "b")
    with using(model, "a"):
        remove(model)
    assert not vars(model).get("_surgery_model")
    apply_rules(model, LoraRule("0", rank=2), adapter="a")
    with using(model, None):
        remove(model)
        apply_rules(model, LoraRule("0", rank=2), adapter="a")  # another adapter with a name that was live before
        apply_rules(model, LoraRule("0", rank=2), adapter="c")
    assert active(model) == ("a",)


def test_flags_that_were_set_by_hand_come_back() -> None:
    model = model_with("a", "b")
    model.get_parameter("0.adapters.a.A").requires_grad_(False)
    activate(model, "b")
    activate(model, ["a", "b"])
    assert not model.get_parameter("0.adapters.a.A").requires_grad
    assert model.get_parameter("0.adapters.a.B").requires_grad


def training(model: nn.Module) -> set[str]:
    return {name.split(".")[2] for name in list_trained(model)}


def test_adapters_are_live_and_frozen() -> None:
    model = model_with("a", "b")
    wanted = compute_expected(model, "a")
    assert torch.allclose(activate(model, "a", train=False)(X), wanted, **CLOSE) and training(model) == set()
    assert training(activate(model, "b")) == {"b"}
    assert training(activate(model, ["a", "b"])) == {"b"}  # a stays frozen until the user unfreezes it
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.requires_grad_(False)
    assert training(activate(model, ["a", "b"], train=True)) == {"a", "b"}
    set_trained(activate(model, "a"), ["b"], False)  # b is idle
    assert training(activate(model, "b")) == set() and training(activate(model, "b", train=True)) == {"b"}
    apply_rules(model, SteerRule("0", direction=[1.0] * 8), adapter="steer")  # a rule with a tensor that does not train
    assert training(activate(model, ["a", "steer"], train=True)) == {"a"}
    for name in ("steer", "a"):
        copy_adapter(model, name, f"{name}2")
    assert training(activate(model, ["a2", "steer2"], train=True)) == {"a2"}


def test_what_was_live_comes_back() -> None:
    model = model_with("a", "b", "c")
    activate(model, ["a", "b"], weights=[0.5, 1.0])
    output = model(X)
    deactivate(deactivate(model))
    assert active(model) == () and torch.equal(activate(model)(X), output)
    assert adapters(model)["a"].weight == 0.5
    assert active(activate(model)) == ("a", "b")  # nothing was deactivated since
    deactivate(model)
    with using(model, "c"):
        activate(model)
        assert active(model) == ("a", "b")
    with using(model, "c"):
        pass
    assert active(model) == () and active(activate(model)) == ("a", "b")
    with using(model, None):
        assert torch.equal(activate(model)(X), output)
    deactivate(model)
    remove(model, "a")
    rename_adapter(model, "b", "d")
    for copied in (model, copy.deepcopy(model)):
        assert active(activate(copied)) == ("d",)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _overwritten(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _padded(model: nn.Module) -> None:
    for name in ("a", "b"):
        pad_rank(model, name, 6)


def _in_other_dictionaries(model: nn.Module) -> None:  # DeepSpeed stores parameters like this
    for module in model.modules():
        parameters = {k: t for k, t in module._parameters.items() if t is not None}
        module._parameters = {k: nn.Parameter(t.detach().clone(), t.requires_grad) for k, t in parameters.items()}


@pytest.mark.parametrize("replace", [_loaded, _overwritten, _padded, _in_other_dictionaries, copy.deepcopy])
@pytest.mark.parametrize("first", ["a", "b"])
def test_tensors_that_were_replaced_follow_the_switch(replace: Callable[[nn.Module], Any], first: str) -> None:
    model = model_with("a", "b")
    for name in ("a", "b"):
        model.get_parameter(f"0.adapters.{name}.B").requires_grad_(False)
    wanted = {
        "a": {"0.adapters.a.A", "2.adapters.a.A", "2.adapters.a.B"},
        "b": {"0.adapters.b.A"},
    }
    activate(model, first)
    before = model.get_parameter("0.adapters.a.B")
    model = replace(model) or model
    assert model.get_parameter("0.adapters.a.B") is not before
    assert list_trained(model) == wanted[first]
    for name in ("a", "b", "a", "b"):
        assert list_trained(activate(model, name)) == wanted[name]
    assert list_trained(activate(model, ["a", "b"])) == wanted["a"] | wanted["b"]
    assert list_trained(deactivate(model)) == set()


def test_a_tensor_of_several_sites_follows_the_switch() -> None:
    model: Any = model_with("a", "b")
    model[2].adapters.a.B = nn.Parameter(torch.zeros(4, 2))
    model[2].adapters.a.A = model[0].adapters.a.A
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False) if ".a." in name}
    activate(model, "b")
    assert not any(".a." in name for name in list_trained(model))
    assert list_trained(copy_adapter(activate(model, "a"), "a", "c")) == wanted
    activate(model, "c")
    assert model[2].adapters.c.A is model[0].adapters.c.A
    assert list_trained(model) == {name.replace(".a.", ".c.") for name in wanted}


def test_removing_in_any_order() -> None:
    for live in (["a"], ["b", "c"], []):
        for order in (["a", "b", "c"], ["c", "a", "b"]):
            model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
            snapshot, before = Snapshot(model), model(X)
            for name in ("a", "b", "c"):
                apply_rules(model, [LoraRule(["0", "2"], rank=2), IA3Rule("0")][: 1 + (name == "b")], adapter=name)
            activate(model, live)
            for name in order:
                remove(model, name)
                if name != order[-1]:
                    assert set(active(model)) == set(live) - set(order[: order.index(name) + 1])
            assert snapshot.differences(model) == [] and torch.equal(model(X), before)


def test_copies_remember_and_go_on() -> None:
    model = model_with("a", "b")
    activate(model, "b")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert active(other) == ("b",) and torch.equal(other(X), model(X))
        activate(other, "a")
        torch.testing.assert_close(other(X), compute_expected(model, "a"), **CLOSE)
        assert active(model) == ("b",)
        remove(other)
        assert not any("adapters" in key for key in other.state_dict())


def test_merging_takes_the_live_ones() -> None:
    model = model_with("a", "b")
    activate(model, "b")
    live = model(X)
    merge(model)
    torch.testing.assert_close(model(X), live, **CLOSE)
    assert adapters(model)["b"].merged and not adapters(model)["a"].merged
    with pytest.raises(SurgeryError, match="merged"):
        activate(model, "a")
    assert torch.equal(unmerge(model)(X), live) and active(model) == ("b",)
    assert summary(model).trainable == adapters(model)["b"].parameters


def test_rules_that_look_inside() -> None:
    model, x = Plain().eval(), torch.randn(2, 5, 12)
    before = model(x)[0]
    for name in ("a", "b"):
        apply_rules(model, PrefixRule(length=2), adapter=name, example_inputs=x)
    both = model(x)[0]
    activate(model, "a")
    alone = model(x)[0]
    assert not torch.equal(alone, both)
    remove(model, "b")
    assert torch.equal(model(x)[0], alone)
    assert torch.equal(deactivate(model)(x)[0], before)


def test_a_new_adapter_is_live_beside_idle_ones() -> None:
    model = model_with("a")
    deactivate(model)
    apply_rules(model, LoraRule("0", rank=2, alpha=4, init="random"), adapter="b")
    assert active(model) == ("b",)
    torch.testing.assert_close(model(X), compute_expected(model, "b"), **CLOSE)


def test_torch_s_own_fast_path_is_back_where_none_is_live() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        apply_rules(model, LoraRule("linear1", rank=2, init="random"), adapter="a")
        adapted = model(x)
        assert not torch.equal(adapted, before)
        assert torch.equal(deactivate(model)(x), before)
        apply_rules(model, LoraRule("linear2", rank=2, init="random"), adapter="b")
        assert not torch.equal(model(x), before)
        activate(model, "a")
        assert torch.equal(model(x), adapted)
        assert torch.equal(remove(model)(x), before)


def test_threads_do_not_mix() -> None:
    model = model_with("a", "b")
    problems: list[str] = []

    def other() -> None:
        for use in (lambda: activate(model, "b"), lambda: using(model, "b").__enter__()):
            try:
                use()
            except SurgeryError as error:
                problems.append(error.what)

    with using(model, "a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert active(model) == ("a",)
    assert problems == ["another thread is using adapters of this model"] * 2
    activate(model, "b")


def test_refusals() -> None:
    model = model_with("topics", "style")
    with pytest.raises(SurgeryError, match="topics"):
        activate(model, "topic")
    assert active(model) == ("topics", "style")
    pissa = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2, init="pissa"), adapter="p")
    with pytest.raises(SurgeryError, match="can't be idle"):
        deactivate(pissa)
    assert active(pissa) == ("p",)
    with pytest.raises(SurgeryError, match="no rules were applied"):
        deactivate(nn.Linear(2, 2))


def test_one_number_is_the_weight_of_each_adapter() -> None:
    model, x = model_with("a", "b"), torch.randn(2, 8)
    output = activate(model, ["a", "b"], weights=[0.5, 0.5])(x)
    activate(model, ["a", "b"])
    assert not torch.equal(model(x), output)
    assert torch.equal(activate(model, ["a", "b"], weights=0.5)(x), output)
    activate(model, ["a", "b"])
    with using(model, ["a", "b"], weights=0.5):
        assert torch.equal(model(x), output)
    with pytest.raises(SurgeryError, match="there are 1 weights for 2 adapters"):
        activate(model, ["a", "b"], weights=[0.5])


def test_a_mapping_of_weights_is_not_taken_for_names() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0")], adapter="a")
    with pytest.raises(SurgeryError, match="the adapters' names are a mapping"):
        activate(model, {"a": 0.5})  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="give the mapping as weights"), using(model, {"a": 0.5}):  # type: ignore[arg-type]
        pass


def part_inside() -> tuple[nn.Sequential, nn.Sequential]:
    """A model with an adapter, and with a part that was rewritten separately."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(part, nn.Linear(8, 8)).eval()
    apply_rules(model, LoraRule("1", rank=2, init="random"), adapter="whole")
    apply_rules(part, LoraRule("0", rank=2, init="random"), adapter="part")
    return model, part


@pytest.mark.parametrize("verb", ["activate", "deactivate", "using", "using none"])
def test_a_part_with_live_adapters_of_its_own_is_named(verb: str) -> None:
    """No verb on the whole model reaches the part's adapters, so the model would not be the base without them."""
    model, part = part_inside()
    base = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    base.load_state_dict(base_state_dict(model))
    before, state = model(X), Snapshot(model)

    def run() -> None:
        if verb.startswith("using"):
            with using(model, "whole" if verb == "using" else None):
                pass
        elif verb == "activate":
            activate(model, "whole")
        else:
            deactivate(model)

    with pytest.raises(SurgeryError, match="part of this model has live adapters") as error_info:
        run()
    assert error_info.value.where == "0" and "part would stay live" in str(error_info.value)
    assert "deactivate model.0 first" in str(error_info.value)
    assert torch.equal(model(X), before) and state.differences(model) == []
    merge(part)
    with pytest.raises(SurgeryError, match="unmerge and deactivate model.0 first"):
        run()
    deactivate(unmerge(part))
    run()
    with using(model, None):
        assert torch.equal(model(X), base(X))
    activate(part)
    activate(unmodified := model_with("a"), "a")  # verbs do not read other models
    assert active(unmodified) == ("a",) and active(part) == ("part",)


def test_a_copy_of_a_part_counts_as_one() -> None:
    """Copies and pickles bring records, too."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    part = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=2), adapter="part")
    copied = copy.deepcopy(part)
    del part
    apply_rules(model, LoraRule("1", rank=2), adapter="whole")
    model[0] = copied
    with pytest.raises(SurgeryError, match="part of this model has live adapters"):
        deactivate(model)


def test_an_idle_adapter_that_is_merged_is_not_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model.state_dict()["0.weight"].clone()
    for name in "ab":
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    deactivate(model)
    merge(model, "b")
    with pytest.raises(SurgeryError, match="the model is merged"):
        remove(model)
    remove(model, "a")
    unmerge(model)
    assert torch.equal(remove(model).state_dict()["0.weight"], weight)
