"""Prefixes on models of every kind: the numbers, training with gradient checkpointing, generating, exact removal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from surgery import adapter_state_dict, apply_rules, remove, rules_of
from surgery.rules import LoraRule, PrefixRule
from surgery.testing import Snapshot

transformers: Any = pytest.importorskip("transformers")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-5}  # the same products in another order, through four layers
TEXT: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QUIET: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0}


@dataclass(frozen=True)
class Kind:
    """A model, one row of its inputs, and where its prefixes go without targets: how many places."""

    make: Callable[[], Any]
    row: Callable[[], dict[str, Tensor]]
    places: int
    targets: dict[str, int]  # targets that name some attentions alone → how many


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape)


def small(size: str, **fields: Any) -> dict[str, Any]:
    return {size: 32, **fields}


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=8, num_labels=2, hidden_dropout_prob=0.0, initializer_range=0.3,
        )
    )  # fmt: skip


def distilbert() -> Any:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=32, num_labels=2,
            seq_classif_dropout=0.0, initializer_range=0.3, **QUIET,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **TEXT, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip


def t5() -> Any:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip
    model.shared.weight.data.mul_(0.1)  # or the tied head repeats the token before
    return model


def whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **TEXT, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=4, max_source_positions=8,
            max_target_positions=32, decoder_start_token_id=1, init_std=0.3, suppress_tokens=None,
            begin_suppress_tokens=None, **QUIET,
        )
    )  # fmt: skip


def text_row() -> dict[str, Tensor]:
    row = ids(7)
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


KINDS = {
    "vit": Kind(vit, lambda: {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(1)}, 2, {}),
    "distilbert": Kind(distilbert, lambda: {**text_row(), "labels": torch.tensor(1)}, 2, {}),
    "gpt2": Kind(gpt2, text_row, 2, {}),
    "llama": Kind(llama, text_row, 2, {}),
    "t5": Kind(
        t5,
        lambda: {**text_row(), "labels": ids(5)},
        4,
        {"re:encoder.*SelfAttention": 2, "re:decoder.*SelfAttention": 2, "EncDecAttention": 2},
    ),
    "whisper": Kind(
        whisper,
        lambda: {"input_features": torch.randn(4, 16), "labels": ids(5)},
        4,
        {"re:.*encoder.*self_attn": 2, "re:.*decoder.*self_attn": 2, "encoder_attn": 2},
    ),
}
CASES = [(name, targets) for name, kind in KINDS.items() for targets in (None, *kind.targets)]
named = pytest.mark.parametrize("name", KINDS)
cases = pytest.mark.parametrize(("name", "targets"), CASES, ids=[f"{name} {targets or ''}" for name, targets in CASES])
TRAINED = {("llama", None), ("t5", None), ("vit", None)}
trained = pytest.mark.parametrize(
    ("name", "targets"),
    [c if c in TRAINED else pytest.param(*c, marks=pytest.mark.slow("a model of each kind is trained")) for c in CASES],
)
generating = [(name, targets) for name, targets in CASES if name not in ("vit", "distilbert")]


def batch(name: str, rows: int = 2) -> dict[str, Tensor]:
    actual = [KINDS[name].row() for _ in range(rows)]
    return {key: torch.stack([row[key] for row in actual]) for key in actual[0]}


def adapt(name: str, targets: str | None = None, model: Any = None, **fields: Any) -> Any:
    """With prefixes that are moved from where they start."""
    model = KINDS[name].make().eval() if model is None else model
    where = () if targets is None else (targets,)
    apply_rules(model, [PrefixRule(*where, length=3, **fields)], example_inputs=batch(name))
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if ".adapters." in key:
                tensor.normal_()
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


# The numbers --------------------------------------------------------------------------------------------------


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention written out, with the prefix that the test left on the module: it has no positions, hence no bias."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scaling = kwargs.get("scaling")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = query @ key.mT
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    params = getattr(module, "test_prefix", None)
    if params is not None:
        before_key, before_value = (tensor.repeat_interleave(repeats, 0) for tensor in params)
        scores = torch.cat([query @ before_key.mT, scores], -1)
        value = torch.cat([before_value.expand(len(value), -1, -1, -1), value], -2)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attentions

    torch.manual_seed(0)
    attentions.register("plain_for_models", plain)
    masks.register("plain_for_models", masks["eager"])
    yield
    for registry in (attentions, masks):
        registry._global_mapping.pop("plain_for_models", None)


def reference(model: nn.Module) -> Any:
    """The model without rules, its attention written out in this file."""
    other: Any = copy.deepcopy(model)
    boxes = [(module, module._modules["adapters"]) for module in other.modules() if "adapters" in module._modules]
    params = [(module, [t.detach().clone() for t in (box.default.key, box.default.value)]) for module, box in boxes]
    remove(other)
    for module, tensors in params:
        module.test_prefix = tensors
    other.set_attn_implementation("plain_for_models")
    return other


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@cases
def test_it_is_attention_with_more_keys(name: str, targets: str | None, kind: str) -> None:
    model = KINDS[name].make().eval()
    model.set_attn_implementation(kind)
    inputs = batch(name)
    before, expected = Snapshot(model), logits(model, inputs)
    adapt(name, targets, model)
    places = [key for key in adapter_state_dict(model) if key.endswith("adapters.key")]
    assert len(places) == (KINDS[name].places if targets is None else KINDS[name].targets[targets])
    if targets is None:
        assert not any("EncDec" in place or "encoder_attn" in place for place in places)
    torch.testing.assert_close(logits(model, inputs), logits(reference(model), inputs), **CLOSE)
    assert (logits(model, inputs) - expected).abs().max() > 0.01
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -2:] = 0
        real = slice(None) if name in ("t5", "distilbert") else slice(0, -2)  # GPT's own padded positions are no one's
        actual, known = logits(model, inputs), logits(reference(model), inputs)
        torch.testing.assert_close(actual[0, real], known[0, real], **CLOSE)
        torch.testing.assert_close(actual[1], known[1], **CLOSE)
        inputs["attention_mask"].fill_(1)
    remove(model)
    assert before.differences(model) == []
    assert torch.equal(logits(model, inputs), expected)


# Training -----------------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, name: str):
        torch.manual_seed(7)
        self.rows = [KINDS[name].row() for _ in range(8)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def train(model: Any, name: str, folder: Path, checkpointing: bool) -> list[float]:
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=8, learning_rate=0.02, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3, dataloader_pin_memory=False,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Rows(name))
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the settings have new names in the latest transformers
@trained
def test_trainer_with_and_without_gradient_checkpointing(name: str, targets: str | None, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    base = KINDS[name].make().eval()
    before = Snapshot(base)
    model = adapt(name, targets, base)
    other = copy.deepcopy(model)
    start = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    losses = [train(item, name, tmp_path, checkpointing) for item, checkpointing in ((model, False), (other, True))]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-3)
    assert losses[0][-1] < losses[0][0]
    for item in (model, other):
        assert all(not torch.equal(tensor, start[key]) for key, tensor in adapter_state_dict(item).items())
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    remove(model)
    model.eval()
    assert [actual for actual in before.differences(model) if "config" not in actual] == []


@named
def test_beside_lora(name: str) -> None:
    """PEFT refuses the two on one model."""
    model = KINDS[name].make().eval()
    inputs = batch(name)
    before, expected = Snapshot(model), logits(model, inputs)
    linears = [
        key for key, module in model.named_modules() if isinstance(module, nn.Linear) and "classifier" not in key
    ]
    lora: Any = LoraRule("c_attn" if name == "gpt2" else linears[0], rank=2, init="random")
    apply_rules(model, [PrefixRule(length=3), lora], example_inputs=inputs)
    assert len(rules_of(model)) == 2
    model.train()(**inputs).loss.backward()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert len(trained) >= 6 and all(tensor.grad is not None and tensor.grad.any() for tensor in trained)
    model.zero_grad()
    remove(model.eval())
    assert before.differences(model) == []
    assert torch.equal(logits(model, inputs), expected)


# Generating ---------------------------------------------------------------------------------------------------


def prompt(name: str) -> dict[str, Tensor]:
    if name == "whisper":
        return {"input_features": torch.randn(2, 4, 16)}
    rows = ids(2, 6)
    mask = torch.ones_like(rows)
    mask[0, :2] = 0
    return {"input_ids": rows.masked_fill(mask == 0, 0), "attention_mask": mask}  # padded on the left


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("name", "targets"), generating, ids=[f"{name} {targets or ''}" for name, targets in generating]
)
def test_generating_with_and_without_a_cache(name: str, targets: str | None, beams: int) -> None:
    model = adapt(name, targets)
    inputs = prompt(name)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Whisper's own, about its settings
        actual = [
            item.generate(**inputs, use_cache=cache, **settings)
            for item in (model, reference(model))
            for cache in (True, False)
        ]
        base = remove(model).generate(**inputs, **settings)
    assert all(torch.equal(actual[0], other) for other in actual[1:])
    assert actual[0].shape == base.shape and not torch.equal(actual[0], base)
