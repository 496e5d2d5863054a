"""Layers of other models: without a configuration, wrapped, in a host, with several lists, on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BartConfig, BartForConditionalGeneration, XLMConfig, XLMModel

from surgery import SurgeryError, apply_rules, remove
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES
from tests.support.layers import IDS, llama


class Block(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: dict[int, Tensor]) -> Tensor:
        cache[self.layer_idx] = x
        return x + self.linear(x).tanh()


class Net(nn.Module):
    """A model of one's own: its forward counts to `num_layers`, and each block writes to its place of a cache."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.blocks = nn.ModuleList(Block(index) for index in range(num_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        cache: dict[int, Tensor] = {}
        for index in range(self.num_layers):
            x = self.blocks[index](x, cache)
        return x, cache


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (DropRule("blocks.1"), [0, 2]),
        (RepeatRule("blocks", times=2), [0, 1, 2, 0, 1, 2]),
        (ReorderRule("blocks", order=[1, 2, 0]), [1, 2, 0]),
    ],
)
def test_a_model_without_a_configuration(rule: Any, order: list[int]) -> None:
    model, x = Net(3), torch.randn(2, 4)
    original, snapshot = copy.deepcopy(model), Snapshot(model)
    plain = Net(len(order))
    for position, index in enumerate(order):
        plain.blocks[position].load_state_dict(original.blocks[index].state_dict())
    apply_rules(model, [rule])
    (ours, cache), (theirs, expected) = model(x), plain(x)
    assert torch.equal(ours, theirs) and list(cache) == list(expected) == list(range(len(order)))
    assert model.num_layers == len(order)
    remove(model)
    assert not snapshot.differences(model)


@pytest.mark.filterwarnings("ignore:.*as in a model built with these layers")
@pytest.mark.parametrize(
    ("family", "rule", "fields"),
    [
        ("modernbert_decoder", DropRule("model.layers.1"), {"layer_types": ["full_attention"]}),
        (
            "zamba2",
            ReorderRule("model.layers", order=[1, 0]),
            {"hybrid_layer_ids": [0], "layers_block_type": ["hybrid", "linear_attention"]},
        ),
        ("efficientnet", RepeatRule("efficientnet.encoder.blocks", times=2), {"num_hidden_layers": 16}),
    ],
)
def test_fields_that_follow_the_layers(family: str, rule: Any, fields: dict[str, Any]) -> None:
    """Of layers with tensors of their position, in a copy at the model, and derived when the configuration is made."""
    torch.manual_seed(0)
    model: Any = FAMILIES[family].make().eval()
    snapshot, inputs = Snapshot(model), FAMILIES[family].inputs()
    apply_rules(model, [rule])
    assert {name: getattr(model.config, name) for name in fields} == fields
    plain = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    remove(model)
    assert not snapshot.differences(model)


def test_a_cut_that_only_a_call_shows_is_refused() -> None:
    """The class token of CvT is in its last stage, and its configuration does not say the size of images."""
    model = FAMILIES["cvt"].make()
    snapshot = Snapshot(model)
    with pytest.raises(SurgeryError, match="fails when it is called: IndexError"):
        apply_rules(model, [DropRule("cvt.encoder.stages.2")])
    assert not snapshot.differences(model)


def test_a_sequential_with_names_keeps_them() -> None:
    stack = nn.Sequential()
    for name in ("first", "second", "third"):
        stack.add_module(name, nn.Linear(4, 4))
    model = nn.ModuleDict({"stack": stack})
    apply_rules(model, [DropRule("stack.second")], adapter="cut")
    assert list(stack._modules) == ["first", "third"]
    apply_rules(model, [RepeatRule("stack", times=2)], adapter="twice")
    assert list(stack._modules) == ["first", "third", "first_2", "third_2"]
    with pytest.raises(SurgeryError, match="remove 'twice' first"):
        remove(model, "cut")
    remove(model, "twice")
    remove(model, "cut")
    assert list(stack._modules) == ["first", "second", "third"]


def test_a_list_that_is_at_two_places_changes_once() -> None:
    model = Net(3)
    model.again = nn.ModuleList()
    model._modules["again"] = model.blocks
    apply_rules(model, [DropRule("blocks.1")])
    assert len(model.blocks) == len(model.again) == 2  # type: ignore[arg-type]
    remove(model)
    assert len(model.blocks) == 3


def test_layers_in_checkpoint_wrappers() -> None:
    model, plain = llama(), llama()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    rule = RepeatRule("model.layers", order=[0, 2, 1, 2])
    apply_rules(model, [rule])
    apply_rules(plain, [rule])
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(model(IDS, use_cache=True).logits, plain(IDS).logits)
    remove(model)
    assert torch.equal(model(IDS).logits, remove(plain)(IDS).logits)


def test_a_compiled_model_and_a_host() -> None:
    model: Any = llama()
    host: Any = nn.Module()
    host.inner = torch.compile(model, backend="eager")
    apply_rules(host, [DropRule("inner.model.layers.0")])
    assert model.config.num_hidden_layers == 3 and model.model.layers[0].self_attn.layer_idx == 0
    remove(host)
    assert model.config.num_hidden_layers == 4


def bart() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=50, d_model=16, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=16)
    heads: dict[str, Any] = dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=16)
    return BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()


def test_an_encoder_and_a_decoder_in_one_rule() -> None:
    one, two = bart(), bart()
    apply_rules(one, [DropRule(["model.encoder.layers.1", "model.decoder.layers.1"])])
    apply_rules(two, [DropRule("model.encoder.layers.1"), DropRule("model.decoder.layers.1")])
    assert (one.config.encoder_layers, one.config.decoder_layers) == (2, 2)
    assert one.config.to_dict() == two.config.to_dict()
    assert torch.equal(one(input_ids=IDS).logits, two(input_ids=IDS).logits)
    settings: Any = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(one.generate(IDS, **settings), one.generate(IDS, use_cache=False, **settings))
    remove(one)
    assert torch.equal(one(input_ids=IDS).logits, bart()(input_ids=IDS).logits)
    apply_rules(one, [DropRule(["model.encoder.layers.0", "model.decoder.layers.1"])])  # different layers of the two
    assert (len(one.model.encoder.layers), len(one.model.decoder.layers)) == (2, 2)


def test_lists_of_one_number_change_together_or_not_at_all() -> None:
    torch.manual_seed(0)
    config = XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=32)
    model = XLMModel(config).eval()
    lists = ["attentions", "layer_norm1", "ffns", "layer_norm2"]
    snapshot = Snapshot(model)
    with pytest.raises(SurgeryError) as error:
        apply_rules(model, [DropRule("ffns.0")])
    assert all(name in str(error.value) for name in lists) and "n_layers" in str(error.value)
    assert not snapshot.differences(model)
    apply_rules(model, [DropRule([f"{name}.0" for name in lists])])
    plain = XLMModel(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    assert model.config.n_layers == 2 and torch.equal(model(IDS)[0], plain(IDS)[0])


def test_a_model_on_the_meta_device_is_cut() -> None:
    with torch.device("meta"):
        model = llama()
    apply_rules(model, [RepeatRule("model.layers", times=2)])
    assert model.config.num_hidden_layers == len(model.model.layers) == 8
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_layer_comes_back_in_the_dtype_of_the_model() -> None:
    model, plain = llama(), llama().to(torch.bfloat16)
    apply_rules(model, [DropRule("model.layers.1")])
    model.to(torch.bfloat16)
    remove(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_a_layer_comes_back_in_the_mode_of_the_model() -> None:
    model = apply_rules(llama(), [DropRule("model.layers.1")])
    remove(model.train())
    assert all(module.training for module in model.modules())
    apply_rules(model, [DropRule("model.layers.1")])
    remove(model)
    assert all(module.training for module in model.modules())


def test_flags_follow_a_frozen_base() -> None:
    model = llama()
    model.model.layers[1].mlp.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    apply_rules(model, [DropRule("model.layers.1")], adapter="cut")
    apply_rules(model, [LoraRule("q_proj", rank=2)], adapter="lora")
    remove(model, "cut")
    frozen = [parameter.requires_grad for name, parameter in model.named_parameters() if ".adapters." not in name]
    assert not any(frozen)
    remove(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_hooks_of_the_user_stay() -> None:
    model, calls = llama(), list[int]()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module.self_attn.layer_idx))
    apply_rules(model, [ReorderRule("model.layers", order=[3, 2, 1, 0])])
    model(IDS)
    assert calls == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        apply_rules(model, [RepeatRule("model.layers", times=2), LoraRule("q_proj", rank=2, init="random")])
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                nn.init.normal_(parameter)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(gradients[0]) == 16 and all(map(torch.equal, *gradients))


def test_shared_copies_train_one_weight() -> None:
    model = llama(2)
    apply_rules(model, [RepeatRule("model.layers", times=2, shared=True)])
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight and layers[0] is not layers[2]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
