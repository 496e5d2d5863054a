"""PEFT as a peer: the same numbers where it is right, and its failures beside what happens here (the page of peers)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    PlanError,
    SurgeryError,
    apply_rules,
    base_state_dict,
    load_adapter,
    merge,
    plan_rules,
    remove,
    route,
    summary,
    unmerge,
    using,
)
from surgery.rules import LoraRule, PrefixRule, TokensRule, TrainRule
from surgery.testing import Snapshot
from tests.support import ROOT
from tests.support.peers import peft

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words

VERSION = "0.21.2"
reproduced = pytest.mark.skipif(
    metadata.version("peft") != VERSION, reason=f"the failure was seen in PEFT {VERSION}; another version may have none"
)
RANK, ALPHA = 4, 6


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, *args: Tensor) -> Any:
        return self.m(*args)


def in_peft(model: nn.Module, targets: Any = ("m",), **fields: Any) -> Any:
    """PEFT's form of a copy of the model; its B is not zero, unless the fields say otherwise."""
    targets = targets if isinstance(targets, str) else list(targets)
    chosen: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **fields}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, **chosen))


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """The tensors of a PEFT layer under the names that LoraRule gives them."""
    embedding = len(layer.lora_embedding_A) > 0
    A, B = (getattr(layer, f"lora_embedding_{name}" if embedding else f"lora_{name}")["default"] for name in "AB")
    found = {"A": A, "B": B} if embedding else {"A": A.weight, "B": B.weight}
    if not embedding and B.bias is not None:
        found["B_bias"] = B.bias
    if "default" in layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return found


def take_over(theirs: nn.Module, ours: nn.Module) -> None:
    """Give our adapter PEFT's tensors, all over the model."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert layers
    with torch.no_grad():
        for path, layer in layers.items():
            held: Any = ours.get_submodule(f"{path}.adapters.default")
            found = tensors_of(layer)
            assert found.keys() == held.tensors().keys()
            for name, tensor in found.items():
                assert tensor.shape == held.tensors()[name].shape, name
                held.tensors()[name].copy_(tensor)


def assert_close(found: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal to within a few float32 roundings of the largest entry: sums are taken in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= slack * max(1.0, float(expected.abs().max().detach()))


# The same numbers ---------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "Embedding": (lambda: nn.Embedding(10, 6), lambda: torch.randint(0, 10, (2, 5))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 4, 4, 4)),
    "Conv1D": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 8)),
}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"rslora": True}),
    "dora": ({"use_dora": True}, {"dora": True}),
    "lora_bias": ({"lora_bias": True}, {"lora_bias": True}),
}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_given_the_same_tensors_a_layer_is_pefts(layer: str, fields: str) -> None:
    if (layer, fields) == ("Embedding", "lora_bias"):
        pytest.skip("neither has a bias on an embedding's B")
    make, example = LAYERS[layer]
    model, x = Holder(make()), example()
    theirs = in_peft(model, **FIELDS[fields][0])
    ours = apply_rules(model, [LoraRule("m", rank=RANK, alpha=ALPHA, init="random", **FIELDS[fields][1])])
    wrapped = theirs.base_model.model.m
    if fields == "dora":
        with torch.no_grad():  # as if trained: at the start DoRA's magnitude does nothing
            tensors_of(wrapped)["magnitude"].mul_(torch.rand(()) + 0.5)
    take_over(theirs, ours)
    found, expected = ours(x), theirs(x)
    assert_close(found, expected)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, tensor in tensors_of(wrapped).items():
        assert tensor.grad is not None
        assert_close(ours.get_parameter(f"m.adapters.default.{name}").grad, tensor.grad)  # type: ignore[arg-type]
    theirs.eval().merge_adapter()
    merge(ours.eval())
    for name, tensor in wrapped.base_layer.named_parameters():
        assert_close(ours.get_parameter(f"m.{name}"), tensor)


@pytest.mark.parametrize("layer, init", [("Linear", "pissa"), ("Conv1D", "pissa"), ("Linear", "olora")])
def test_pissa_and_olora_start_as_in_peft(layer: str, init: str) -> None:
    model = Holder(LAYERS[layer][0]())
    theirs = in_peft(model, init_lora_weights=init)
    ours: Any = apply_rules(model, [LoraRule("m", rank=RANK, alpha=ALPHA, init=init)])
    wrapped = theirs.base_model.model.m
    for name, tensor in tensors_of(wrapped).items():
        assert_close(getattr(ours.m.adapters.default, name), tensor)
    assert_close(ours.m.weight, wrapped.base_layer.weight)


@pytest.mark.parametrize("layer", ["Linear", "Embedding"])
def test_mica_starts_as_in_peft_and_keeps_b(layer: str) -> None:
    model = Holder(LAYERS[layer][0]())
    theirs = in_peft(model, init_lora_weights="mica")
    ours: Any = apply_rules(model, [LoraRule("m", rank=RANK, alpha=ALPHA, init="mica")])
    for name, tensor in tensors_of(theirs.base_model.model.m).items():
        assert_close(getattr(ours.m.adapters.default, name), tensor)
    assert [name for name, tensor in ours.m.adapters.default.named_parameters() if tensor.requires_grad] == ["A"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "Conv1D"])
def test_a_seed_drops_out_the_same_inputs_as_in_peft(layer: str, dora: bool) -> None:
    make, example = LAYERS[layer]
    model, x = Holder(make()), example()
    theirs = in_peft(model, lora_dropout=0.5, use_dora=dora)
    rule = LoraRule("m", rank=RANK, alpha=ALPHA, dropout=0.5, dora=dora, init="random")
    ours = apply_rules(model, [rule])
    take_over(theirs, ours)
    outputs = []
    for adapted in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(adapted(x))
    assert_close(*outputs)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_a_whole_model_is_pefts(family: str) -> None:
    model, inputs = tiny.FAMILIES[family]()
    patterns: dict[str, Any] = {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {"nowhere_else|1.*": 3}}
    if family not in ("bert", "llama"):
        patterns = {}
    # PEFT knows a classifier for the head by the task alone, and then trains it.
    head = {"exclude_modules": ["classifier"]} if hasattr(model, "classifier") else {}
    theirs = in_peft(model.eval(), "all-linear", **patterns, **head)
    rule = LoraRule("all-linear", rank=RANK, alpha=ALPHA, init="random", **patterns)
    ours = apply_rules(model, [rule])
    take_over(theirs, ours)
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    trainable, total = theirs.get_nb_trainable_parameters()
    found = summary(ours)
    assert (found.trainable, found.total) == (trainable, total)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["0.attention.self.query"]},
        {"target_modules": r".*\.(query|dense)"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["dense", "0.attention.self.key"]},
        {"target_modules": ["query"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_targets_are_read_as_peft_reads_them(fields: dict[str, Any]) -> None:
    model = tiny.bert()[0]
    given = {"target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers"}
    ours = {given[name]: value for name, value in fields.items()}
    if isinstance(ours["targets"], str) and ours["targets"] != "all-linear":
        ours["targets"] = "re:" + ours["targets"]  # PEFT takes any single string for a regular expression
    plan = plan_rules(model, [LoraRule(**ours)])
    plan.raise_problems()
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields, task_type="SEQ_CLS"))
    assert sorted(step.path for step in plan.steps) == sorted(
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    )


def test_trained_modules_and_tokens_are_pefts() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.Linear(6, 3))
    x = torch.randint(0, 10, (4, 5))
    theirs = in_peft(model, ["1"], modules_to_save=["2"], trainable_token_indices={"0": [7, 2]})
    rules = [LoraRule("1", rank=RANK, alpha=ALPHA, init="random"), TrainRule("2"), TokensRule("0", tokens=[7, 2])]
    ours: Any = apply_rules(model, rules)
    take_over(theirs, ours)
    inner = theirs.base_model.model
    with torch.no_grad():
        inner[2].modules_to_save["default"].weight.add_(1.0)
        rows = inner[0].token_adapter.trainable_tokens_delta["default"]
        rows.add_(torch.randn_like(rows))
        ours[2].adapters.default.weight.add_(1.0)
        index: Tensor = ours[0].adapters.default.index  # in the order of the rows of the matrix, not as given
        order = [[7, 2].index(int(token)) for token in index]
        ours[0].adapters.default.rows.copy_(rows[order])
    assert_close(ours(x), theirs(x))
    assert summary(ours).trainable == theirs.get_nb_trainable_parameters()[0]


# PEFT's failures, and what happens here -----------------------------------------------------------------------


@reproduced
def test_peft_changes_an_attentions_output_map_twice() -> None:
    attention: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    theirs: Any = in_peft(Holder(attention))
    layer = theirs.base_model.model.m
    inner, outer = tensors_of(layer), tensors_of(layer.base_layer.out_proj)

    def by_hand(times: int) -> Tensor:
        reference: Any = copy.deepcopy(attention)
        with torch.no_grad():
            reference.in_proj_weight += ALPHA / RANK * inner["B"] @ inner["A"]
            reference.out_proj.weight += times * ALPHA / RANK * outer["B"] @ outer["A"]
        return reference(x, x, x)[0]

    once, twice = by_hand(1), by_hand(2)
    assert (once - twice).abs().max() > 0.1
    assert_close(theirs(x, x, x)[0], twice)
    ours: Any = apply_rules(Holder(copy.deepcopy(attention)), [LoraRule("m", rank=RANK, alpha=ALPHA)])
    with torch.no_grad():
        for name, tensor in {**inner, **{f"out_{name}": tensor for name, tensor in outer.items()}}.items():
            getattr(ours.m.adapters.default, name).copy_(tensor)
    assert_close(ours(x, x, x)[0], once)
    merge(ours)
    assert_close(ours(x, x, x)[0], once)


@reproduced
def test_peft_refuses_attention_with_other_sizes_of_key_and_value() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    with pytest.raises(ValueError, match="Only same embed"):
        in_peft(Holder(attention))
    assert plan_rules(Holder(attention), [LoraRule("m")])  # computed by hand in test_lora.py


def merged_and_live(model: nn.Module, x: Tensor, fold: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        live = model(x)
        fold()
        return model(x), live


@reproduced
@pytest.mark.parametrize("case", ["reflect", "dilated", "grouped"])
def test_peft_fails_at_convolutions_with_settings(case: str) -> None:
    settings: dict[str, Any] = {
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "dilated": {"padding": 2, "dilation": 2},
        "grouped": {"groups": 2},
    }[case]
    convolution, x = nn.Conv2d(4, 8, 3, **settings).eval(), torch.randn(2, 4, 9, 9)
    theirs = in_peft(Holder(convolution)).eval()
    if case == "reflect":  # merged and unmerged are two different functions
        merged, live = merged_and_live(theirs, x, theirs.merge_adapter)
        assert (merged - live).abs().max() > 0.5
    elif case == "dilated":
        with pytest.raises(RuntimeError, match="size of tensor"):
            theirs(x)
    else:
        with pytest.raises(NotImplementedError, match="groups > 1"):
            theirs.merge_adapter()
    ours: Any = apply_rules(Holder(copy.deepcopy(convolution)), [LoraRule("m", rank=RANK, alpha=ALPHA, init="random")])
    A, B = (getattr(ours.m.adapters.default, name).detach() for name in "AB")
    groups = convolution.groups
    by_group = torch.cat([b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])
    changed = copy.deepcopy(convolution)
    with torch.no_grad():
        changed.weight += ALPHA / RANK * by_group.view_as(changed.weight)
    merged, live = merged_and_live(ours.eval(), x, lambda: merge(ours))
    assert_close(live, changed(x))
    assert_close(merged, changed(x))


class Functional(nn.Module):
    """Reads its child's weight past the child's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight, self.lin.bias)


@reproduced
def test_peft_is_bypassed_without_a_word() -> None:
    model, x = Functional(), torch.randn(3, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theirs = in_peft(model, ["lin"])
        assert torch.equal(theirs(x), model(x)) and not theirs(x).requires_grad
    assert not told
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"would be bypassed[\s\S]*test_peers.py:\d+: return F.linear"):
        apply_rules(model, [LoraRule("lin")])
    assert before.differences(model) == []


@reproduced
def test_pefts_dora_is_nan_where_a_weight_is_zero() -> None:
    model, x = Holder(nn.Linear(8, 6)), torch.randn(3, 8)
    with torch.no_grad():
        model.m.weight[2] = 0.0  # type: ignore[index]
    expected = model(x)
    found = in_peft(model, use_dora=True, init_lora_weights=True)(x)
    assert found[:, 2].isnan().all() and not found[:, :2].isnan().any()
    assert torch.equal(apply_rules(model, [LoraRule("m", rank=RANK, dora=True)])(x), expected)


def small_llama() -> Any:
    import transformers

    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))


@reproduced
def test_pefts_prefix_fails_with_gradient_checkpointing() -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(small_llama(), prefix).train()
    theirs.gradient_checkpointing_enable()
    with pytest.raises((RuntimeError, ValueError)):
        theirs(input_ids=torch.tensor([[1, 2, 3]]))


def small_encoder(name: str) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    if name == "ViT":
        sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
        config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "DeBERTa-v2":
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
        deberta = transformers.DebertaV2Config(vocab_size=20, relative_attention=True, pos_att_type=["c2p"], **sizes)
        return transformers.DebertaV2ForSequenceClassification(deberta), {"input_ids": torch.tensor([[1, 2, 3]])}
    config = transformers.DistilBertConfig(dim=16, hidden_dim=16, vocab_size=20, n_layers=2, n_heads=4)
    return transformers.DistilBertForSequenceClassification(config), {"input_ids": torch.tensor([[1, 2, 3]])}


@reproduced
@pytest.mark.parametrize("name", ["ViT", "DistilBERT", "DeBERTa-v2"])
def test_pefts_prefix_fails_for_encoders_without_a_cache(name: str) -> None:
    model, inputs = small_encoder(name)
    model.eval()
    prefix = peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=16, num_layers=2, num_attention_heads=4
    )
    with pytest.raises((AttributeError, ValueError), match="vocab_size|past key values"):
        peft.get_peft_model(copy.deepcopy(model), prefix)(**inputs)
    before, expected = Snapshot(model), model(**inputs).logits
    apply_rules(model, [PrefixRule(length=3)], example_inputs=inputs)
    found = model(**inputs).logits
    assert found.requires_grad and not torch.equal(found, expected)
    assert before.differences(remove(model)) == []


@reproduced
def test_pefts_prefix_goes_with_no_other_method() -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    theirs = peft.get_peft_model(small_llama(), lora)
    with pytest.raises(ValueError, match="different peft types"):
        theirs.add_adapter("second", prefix)


@reproduced
def test_peft_can_not_start_olora_on_a_conv1d() -> None:
    model, x = Holder(LAYERS["Conv1D"][0]()), torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_peft(model, init_lora_weights="olora")(x)
    before = model(x)
    ours = apply_rules(model, [LoraRule("m", rank=RANK, init="olora")])
    assert_close(ours(x), before)  # what the branch adds was taken off the weight


@reproduced
def test_peft_leaves_the_base_frozen_and_pissa_in_its_weight() -> None:
    model = Holder(nn.Linear(16, 12))
    before = Snapshot(model)
    weight = model.m.weight.detach().clone()  # type: ignore[operator]
    unloaded = in_peft(model, init_lora_weights="pissa").unload()
    assert not any(parameter.requires_grad for parameter in unloaded.parameters())
    assert (unloaded.m.weight - weight).abs().max() > 0.1
    remove(apply_rules(model, [LoraRule("m", rank=RANK, init="pissa")]))
    assert before.differences(model) == [] and model.m.weight.requires_grad  # type: ignore[union-attr]


@reproduced
def test_peft_changes_the_embedding_that_is_tied_to_a_head() -> None:
    model, inputs = tiny.gpt2()
    model.eval()
    theirs = in_peft(model, ["lm_head"]).eval()
    embedding = model.transformer.wte.weight.detach().clone()
    with torch.no_grad():
        live = theirs(**inputs).logits
        merged = theirs.merge_and_unload()
        assert (merged(**inputs).logits - live).abs().max() > 0.5
    assert not torch.equal(merged.transformer.wte.weight, embedding)

    ours: Any = apply_rules(model, [LoraRule("lm_head", rank=RANK, alpha=ALPHA, init="random")])
    with torch.no_grad():
        live = ours(**inputs).logits
        with pytest.raises(SurgeryError, match="transformer.wte.weight"):
            merge(ours)
        assert torch.equal(ours(**inputs).logits, live)
        merge(ours, untie=True)
        assert_close(ours(**inputs).logits, live, slack=1e-5)  # the weight was rounded once more
        assert torch.equal(ours.transformer.wte.weight, embedding)
        unmerge(ours)
    assert ours.lm_head.weight is ours.transformer.wte.weight


@reproduced
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_peft_unmerges_to_other_bits(dtype: torch.dtype) -> None:
    model = Holder(nn.Linear(64, 64).to(dtype))
    before = model.m.weight.detach().clone()  # type: ignore[operator]
    theirs = in_peft(model)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    moved = (theirs.base_model.model.m.base_layer.weight != before).float().mean()
    assert moved > 0.05
    ours: Any = apply_rules(model, [LoraRule("m", rank=RANK, alpha=ALPHA, init="random")])
    merge(ours)
    assert not torch.equal(ours.m.weight, before)
    unmerge(ours)
    assert torch.equal(ours.m.weight, before)


@reproduced
def test_peft_drifts_over_a_hundred_merges() -> None:
    model = Holder(nn.Linear(32, 32).bfloat16())
    before = model.m.weight.detach().clone()  # type: ignore[operator]
    theirs = in_peft(model)
    ours: Any = apply_rules(model, [LoraRule("m", rank=RANK, alpha=ALPHA, init="random")])
    for _ in range(100):
        with torch.no_grad():  # training goes on in between
            for tensor in (*tensors_of(theirs.base_model.model.m).values(), *ours.m.adapters.default.parameters()):
                tensor.add_(torch.randn_like(tensor) * 0.1)
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        unmerge((merge(ours), ours)[1])
    drift = (theirs.base_model.model.m.base_layer.weight - before).float().norm() / before.float().norm()
    assert drift > 0.01 and torch.equal(ours.m.weight, before)


@reproduced
def test_peft_renames_and_wraps() -> None:
    model = tiny.bert()[0]
    keys = list(model.state_dict())
    theirs = in_peft(model, ["query"])
    assert not set(keys) & set(theirs.state_dict())
    inner = theirs.base_model.model.bert.encoder.layer[0].attention.self.query
    assert not isinstance(inner, nn.Linear)
    theirs.merge_adapter()
    assert not isinstance(theirs.base_model.model.bert.encoder.layer[0].attention.self.query, nn.Linear)

    ours: Any = apply_rules(model, [LoraRule("query")])
    assert ours is model and list(base_state_dict(ours)) == keys and set(keys) <= set(ours.state_dict())
    assert isinstance(ours.bert.encoder.layer[0].attention.self.query, nn.Linear)
    merge(ours)
    assert type(ours.bert.encoder.layer[0].attention.self.query) is nn.Linear


class Idle(nn.Module):
    """Has a layer that no call comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@reproduced
def test_peft_adapts_what_is_never_called() -> None:
    x = torch.randn(2, 4)
    in_peft(Idle(), ["used", "idle"])(x).sum().backward()  # no word of it
    with pytest.raises(PlanError, match="idle"):
        apply_rules(Idle(), [LoraRule(["used", "idle"])], example_inputs=x)


def two_of_pefts(tmp_path: Any, **of_b: Any) -> tuple[Any, Any]:
    """A model with PEFT's adapters a and b, and a copy of its base with the same ones."""
    model, _ = tiny.bert()
    base = copy.deepcopy(model)
    fields = {"init_lora_weights": False, "lora_alpha": ALPHA}
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2, **fields), "a")
    theirs.add_adapter("b", peft.LoraConfig(target_modules=["query", "dense"], r=3, **fields, **of_b))
    theirs.save_pretrained(str(tmp_path))
    for name in ("a", "b"):
        load_adapter(base, tmp_path / name, name)
    return theirs.eval(), base.eval()


def test_rows_of_a_batch_are_pefts(tmp_path: Any) -> None:
    theirs, ours = two_of_pefts(tmp_path)
    ids = torch.randint(3, 50, (4, 6))
    names = ["a", "__base__", "b", "a"]
    with torch.no_grad(), route(ours, [None if name == "__base__" else name for name in names]):
        found = ours(input_ids=ids).logits
    with torch.no_grad():
        expected = theirs(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@reproduced
def test_peft_routes_no_training_and_no_dora(tmp_path: Any) -> None:
    theirs, ours = two_of_pefts(tmp_path, use_dora=True)
    ids = torch.randint(3, 50, (3, 6))
    names: list[str | None] = ["a", None, "b"]
    for training, why in ((False, "DoRA"), (True, "training mode")):
        with pytest.raises(ValueError, match=why):
            theirs.train(training)(input_ids=ids, adapter_names=["a", "__base__", "b"])
    with route(ours.train(), names):
        ours(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if ".adapters." in name)
    ours.eval()
    with torch.no_grad(), route(ours, names):
        mixed = ours(input_ids=ids).logits
    for row, name in enumerate(names):
        with torch.no_grad(), using(ours, name):
            torch.testing.assert_close(mixed[row], ours(input_ids=ids[row : row + 1]).logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(metadata.version("peft") != VERSION, reason=f"the page lists the methods of PEFT {VERSION}")
def test_the_page_lists_the_methods_that_only_peft_has() -> None:

    from surgery.peft.base_config import PeftConfig

    page = ROOT.joinpath("docs", "explanation", "peers.md").read_text().split("## What only PEFT has")[1]
    listed = {name.strip().replace("-", "").upper() for name in page.split("Methods:")[1].split(".")[0].split(",")}
    only = {kind.value for kind in peft.PeftType} - set(PeftConfig.kinds)  # type: ignore[arg-type]
    assert listed == only - {"TRAINABLE_TOKENS"}
