"""PEFT's options for an adapter's tensors: `autocast_adapter_dtype`, `low_cpu_mem_usage` and `is_trainable`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from surgery import peft as ours
from surgery.errors import SurgeryError
from surgery.peft import (
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

TARGETS = ["0", "2"]
CONFIGS = [
    LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]),
    LoHaConfig(r=2, target_modules=TARGETS),
    LoKrConfig(r=2, target_modules=TARGETS),
    IA3Config(target_modules=TARGETS, feedforward_modules=["2"]),
    OFTConfig(r=2, oft_block_size=0, target_modules=TARGETS),
    BOFTConfig(boft_block_size=2, target_modules=TARGETS),
    HRAConfig(r=2, target_modules=TARGETS),
    MissConfig(r=2, target_modules=TARGETS),
    VeraConfig(r=2, target_modules=TARGETS),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.peft_type.value))


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(dtype)


def adapter_tensors(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if f".adapters.{adapter}." in name}


@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_have_the_dtype_that_is_asked_for(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(4, 8, dtype=dtype)
    get_peft_model(model_of(), config).save_pretrained(tmp_path)
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(model_of(dtype), config, autocast_adapter_dtype=autocast)
        model.add_adapter("other", config, autocast_adapter_dtype=autocast)
        loaded = PeftModel.from_pretrained(model_of(dtype), tmp_path, autocast_adapter_dtype=autocast)
        loaded.load_adapter(tmp_path, "other", autocast_adapter_dtype=autocast)
        for façade in (model, loaded):
            for name in ("default", "other"):
                dtypes = {
                    tensor.dtype
                    for key, tensor in adapter_tensors(façade, name).items()
                    if key.rpartition(".")[2] not in ("weight", "bias")
                }
                assert dtypes <= {expected}
            output = façade(x)
            assert output.dtype == dtype and output.isfinite().all()
        output = model(x)
        output.float().pow(2).sum().backward()
        gradients = [tensor.grad for tensor in adapter_tensors(model).values() if tensor.requires_grad]
        assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_product_of_lora_is_computed_in_the_dtype_of_its_tensors() -> None:
    config, x = CONFIGS[0], torch.randn(4, 8, dtype=torch.bfloat16)
    base = model_of(torch.bfloat16)
    model = get_peft_model(model_of(torch.bfloat16), config, autocast_adapter_dtype=False)
    tensors = adapter_tensors(model)
    hidden = x
    for index in (0, 2):
        A, B = (tensors[f"{index}.adapters.default.{name}"] for name in "AB")
        expected = base[index](hidden) + (hidden @ A.T) @ B.T * (config.lora_alpha / config.r)
        hidden = base[1](expected) if index == 0 else expected
    torch.testing.assert_close(model(x), hidden, rtol=2**-6, atol=2**-6)  # a few roundings of bfloat16, 2**-8 each


@each_config
def test_tensors_on_meta_are_filled_by_a_state_dict(config: Any) -> None:
    source = get_peft_model(model_of(), config)
    with torch.no_grad():
        for tensor in adapter_tensors(source).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    model = model_of()
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    tensors = adapter_tensors(model)
    assert tensors and all(tensor.is_meta for tensor in tensors.values())
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    x = torch.randn(4, 8)
    assert not any(tensor.is_meta for tensor in adapter_tensors(model).values())
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_a_state_dict_that_does_not_fit_leaves_tensors_on_meta() -> None:
    model = model_of()
    inject_adapter_in_model(CONFIGS[0], model, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(get_peft_model(model_of(), CONFIGS[0]))
    state["base_model.model.0.lora_A.weight"] = torch.zeros(3, 8)
    with pytest.raises(SurgeryError):
        set_peft_model_state_dict(model, state)
    assert all(tensor.is_meta for tensor in adapter_tensors(model).values())


@each_config
@pytest.mark.parametrize("first", [False, True])
def test_a_loaded_adapter_that_is_not_active_is_trainable_if_asked_for(
    config: Any, first: bool, tmp_path: Path
) -> None:
    get_peft_model(model_of(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(model_of(), tmp_path, is_trainable=first)
    model.load_adapter(tmp_path, "same", is_trainable=first)
    model.load_adapter(tmp_path, "opposite", is_trainable=not first)
    for name, trainable in {"default": first, "same": first, "opposite": not first}.items():
        flags = {tensor.requires_grad for tensor in adapter_tensors(model, name).values()}
        assert (True in flags) == trainable
    assert model.active_adapters == ["default"]
    model.set_adapter("same")  # which freezes the others
    assert not any(tensor.requires_grad for tensor in adapter_tensors(model, "opposite").values())
    assert any(tensor.requires_grad for tensor in adapter_tensors(model, "same").values())


def test_safe_serialization_false_writes_a_file_of_torch_save(tmp_path: Path) -> None:
    model, x = get_peft_model(model_of(), CONFIGS[0]), torch.randn(4, 8)
    model.add_adapter("other", CONFIGS[0])
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)  # in the place of the other file
    for folder in (tmp_path, tmp_path / "other"):
        files = {file.name for file in folder.iterdir() if file.name.startswith("adapter_")}
        assert files == {"adapter_model.bin", "adapter_config.json"}
    written = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    expected = get_peft_model_state_dict(model)
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    assert torch.equal(PeftModel.from_pretrained(model_of(), tmp_path)(x), model.eval()(x))
    assert torch.equal(peft.PeftModel.from_pretrained(model_of(), tmp_path)(x), model(x))


def test_tensors_that_a_state_dict_lacks_stay_on_meta() -> None:
    source, model = model_of(), model_of()
    inject_adapter_in_model(CONFIGS[0], source)
    inject_adapter_in_model(CONFIGS[0], model, low_cpu_mem_usage=True)
    tensors = get_peft_model_state_dict(source)
    lacking = next(key for key in tensors if "lora_B" in key)
    state = {key: tensor for key, tensor in tensors.items() if key != lacking}
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert result.missing_keys == [lacking]
    assert sum(tensor.is_meta for tensor in adapter_tensors(model).values()) == 1
    set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(adapter_tensors(model)[key], value) for key, value in adapter_tensors(source).items())


def test_a_state_dict_on_meta_is_refused() -> None:
    model = model_of()
    inject_adapter_in_model(CONFIGS[0], model)
    before = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    state = {key: tensor.to("meta") for key, tensor in get_peft_model_state_dict(model).items()}
    with pytest.raises(SurgeryError, match="are on the device meta"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(model).items())


def test_rows_of_tokens_start_at_random_if_asked_for() -> None:
    for weights, changed in ((True, False), (False, True)):
        base = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        config = TrainableTokensConfig(token_indices=[2, 7], target_modules=["0"], init_weights=weights)
        x = torch.tensor([[1, 2, 7]])
        before = base(x)
        output = get_peft_model(base, config)(x)
        assert torch.equal(output[:, 0], before[:, 0])
        assert (not torch.equal(output[:, 1:], before[:, 1:])) == changed


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["0"]),
        FourierFTConfig(n_frequency=4, target_modules=["0"]),
        C3AConfig(block_size=4, target_modules=["0"]),
        RandLoraConfig(r=2, target_modules=["0"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_a_safe_merge_of_values_that_are_not_finite_says_so(config: Any) -> None:
    model = get_peft_model(model_of(), config)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            if tensor.requires_grad:
                tensor.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.linear = nn.Embedding(12, 8), nn.Linear(8, 4, bias=False)  # PEFT's rows of a head drop its bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.emb(ids))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("TrainableTokensConfig", {"target_modules": ["emb"], "token_indices": [7, 2]}),
        (
            "LoraConfig",
            {"r": 2, "lora_alpha": 1, "target_modules": ["linear"], "trainable_token_indices": {"emb": [7, 2]}},
        ),
        (
            "LoraConfig",
            {"r": 2, "lora_alpha": 1, "target_modules": ["linear"], "trainable_token_indices": {"linear": [3, 2]}},
        ),
    ],
)
def test_rows_of_tokens_have_pefts_dtype(
    kind: str, fields: dict[str, Any], dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    if "linear" in fields.get("trainable_token_indices", {}):
        fields = {**fields, "target_modules": ["emb"]}
    torch.manual_seed(0)
    base, ids = Words().to(dtype), torch.tensor([[1, 7, 2, 11]])
    theirs = peft.get_peft_model(
        copy.deepcopy(base), getattr(peft, kind)(**fields), autocast_adapter_dtype=autocast
    ).eval()
    mine = get_peft_model(copy.deepcopy(base), getattr(ours, kind)(**fields), autocast_adapter_dtype=autocast).eval()
    assert torch.equal(mine(ids), base(ids))
    state = peft.get_peft_model_state_dict(theirs)
    same = get_peft_model_state_dict(mine)
    assert {key: tensor.dtype for key, tensor in same.items()} == {key: tensor.dtype for key, tensor in state.items()}
    state = {key: tensor + torch.randn_like(tensor) for key, tensor in state.items()}
    peft.set_peft_model_state_dict(theirs, state)
    set_peft_model_state_dict(mine, state)
    kept = {key: tensor for key, tensor in get_peft_model_state_dict(mine).items() if "tokens" in key}
    assert kept and all(torch.equal(tensor, state[key]) for key, tensor in kept.items())  # with all of its bits
    expected = theirs(ids)
    close: Any = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}  # LoRA rounds in another order
    torch.testing.assert_close(mine(ids), expected, **close)
    live = mine(ids)
    mine.merge_adapter()
    torch.testing.assert_close(mine(ids), live, rtol=2e-2, atol=2e-2)
    mine.unmerge_adapter()
    assert torch.equal(mine(ids), live)
    mine.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(again(ids), live)
    assert torch.equal(mine.unload()(ids), base(ids))
