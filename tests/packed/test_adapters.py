"""What verbs do with adapters on quantised Linears: rows, hot-swaps, copies, pickles, checkpointed activations."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import activate, apply_rules, deactivate, hotswap, packed_weight_of, route, save_adapter, summary, using
from surgery.peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from surgery.rules import LoraRule
from tests.support.quantised import BY_NAME

pytestmark = pytest.mark.usefixtures("quiet")
NF4, INT8 = "bitsandbytes Linear4bit nf4, double", "bitsandbytes Linear8bitLt"
DORA = LoraRule(["0", "2"], rank=4, init="random", dora=True)


def quantised(name: str, linear: nn.Linear) -> nn.Module:
    backend = BY_NAME[name]
    try:
        return backend.build(linear)
    except ImportError as error:
        pytest.skip(f"needs {backend.package}: {error}")


def two_adapters(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layers = (quantised(name, nn.Linear(64, 64)), nn.ReLU(), quantised(name, nn.Linear(64, 32)))
    model = nn.Sequential(*layers).eval()
    apply_rules(model, DORA, adapter="a")
    deactivate(model)
    apply_rules(model, DORA, adapter="b")
    return model, torch.randn(6, 64)


@pytest.mark.parametrize("name", [NF4, INT8])
def test_rows_with_adapters_of_their_own(name: str) -> None:
    model, x = two_adapters(name)
    alone = []
    for adapter in ("a", "b"):
        with using(model, adapter), torch.no_grad():
            alone.append(model(x))
    with route(model, ["a", "b", "b", "a", "a", "b"]), torch.no_grad():
        rows = model(x)
    # Sums of 64 products in another order.
    for row, chosen in enumerate([0, 1, 1, 0, 0, 1]):
        torch.testing.assert_close(rows[row], alone[chosen][row], rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).norm() > 0.1 * alone[0].norm()


def test_a_hot_swap_changes_the_norm_too(tmp_path: Path) -> None:
    model, x = two_adapters(NF4)
    with using(model, "a"), torch.no_grad():
        expected = model(x)
    save_adapter(model, tmp_path, adapter="a")
    activate(model, "b")
    before = model(x).detach()
    hotswap(model, "b", tmp_path)
    assert torch.equal(model(x), expected) and not torch.equal(before, expected)


@pytest.mark.parametrize("name", [NF4, INT8])
def test_copies_and_pickles(name: str) -> None:
    model, x = two_adapters(name)
    y = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            twin[0].adapters.b.A.mul_(2)
        assert not torch.equal(twin(x), y) and torch.equal(model(x), y)
    assert set(summary(model).to_dict()) and packed_weight_of(model[0]) is not None


@pytest.mark.parametrize("name", [NF4, INT8])
def test_training_with_checkpointed_activations(name: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, last = path.rpartition(".")
            setattr(base.get_submodule(parent), last, quantised(name, module))
    ids, results = torch.randint(0, 32, (2, 7)), []
    for checkpointing in (False, True):
        for facade in (False, True):
            model = copy.deepcopy(base)
            torch.manual_seed(1)
            if facade:
                model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
                settings = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
                model = get_peft_model(model, settings)
            else:
                apply_rules(model, LoraRule("all-linear", rank=4, dora=True, init="random"))
                if checkpointing:
                    model.activation_checkpointing_enable()
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 7 * 3
    for other in results[1:]:
        for gradient, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(gradient, expected)
