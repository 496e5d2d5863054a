"""`extract_lora`, against plain singular values and the fine-tune itself."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from surgery import PlanError, SurgeryError, apply_rules, extract_lora, load_adapter, remove, rules_of
from surgery.checkpoints.checkpoint_files import Shard
from surgery.rules import LoraRule

IDS = torch.arange(8)[None]
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **fields)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=2)).eval()


def tuned_of(model: Any, change: Callable[[str, Tensor], Tensor | None]) -> Any:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if (delta := change(name, parameter)) is not None:
                parameter += delta
    return tuned


def everywhere(_: str, weight: Tensor) -> Tensor:
    return 0.05 * torch.randn_like(weight)


def low_rank(name: str, weight: Tensor) -> Tensor | None:
    if not name.endswith("q_proj.weight"):
        return None
    return 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), gpt2], ids=["llama", "tied", "gpt2"])
def test_base_and_adapter_are_the_fine_tune(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    tuned = tuned_of(model, everywhere)
    base, other = saved(model, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    report = extract_lora(base, other, tmp_path / "adapter", format="peft")
    assert report.error < 1e-5 and not report.left_out
    again = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(again(IDS).logits, tuned(IDS).logits, atol=1e-5)
    assert torch.equal(remove(again)(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    tuned = tuned_of(model, everywhere)
    extract_lora(model, tuned, tmp_path, format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert torch.allclose(loaded(IDS).logits, tuned(IDS).logits, atol=1e-5)


def test_the_error_is_that_of_the_discarded_singular_values(tmp_path: Path) -> None:
    model = llama()
    tuned = tuned_of(model, everywhere)
    report = extract_lora(model, tuned, tmp_path, rank=4, only="all-linear", others="leave out")
    total = lost = 0.0
    for site in report.sites:
        weight = f"{site.path}.weight"
        delta = tuned.get_parameter(weight).detach().double() - model.get_parameter(weight).detach().double()
        squares = torch.linalg.svdvals(delta).square()
        assert site.rank == 4 and site.error == pytest.approx(
            float((squares[4:].sum() / squares.sum()).sqrt()), rel=1e-4
        )
        total, lost = total + float(squares.sum()), lost + float(squares[4:].sum())
    assert len(report.sites) == 14 and report.error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    loaded = load_adapter(copy.deepcopy(model), tmp_path)
    assert loaded.loaded
    assert {name.rpartition(".")[0] for name in report.left_out} >= {"model.embed_tokens", "model.norm", "lm_head"}


def test_ranks_by_tolerance_and_their_limit(tmp_path: Path) -> None:
    model = llama()
    tuned = tuned_of(model, everywhere)
    report = extract_lora(model, tuned, tmp_path / "a", tolerance=0.5, only=["q_proj", "k_proj"], others="leave out")
    assert all(0 < site.error <= 0.5 for site in report.sites) and len({site.rank for site in report.sites}) > 1
    with pytest.raises(PlanError, match="rank 2 loses more than the tolerance"):
        extract_lora(model, tuned, tmp_path / "b", tolerance=0.5, rank=2, only="q_proj", others="leave out")
    assert not (tmp_path / "b").exists()


def test_a_low_rank_is_found_in_checkpoints_of_every_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = llama()
        tuned = tuned_of(model, low_rank)
        base, other = (saved(m.to(dtype), tmp_path / f"{n}{dtype}") for n, m in (("base", model), ("tuned", tuned)))
        report = extract_lora(base, other, tmp_path / f"adapter{dtype}", dtype=torch.bfloat16)
        assert {(site.path.rpartition(".")[2], site.rank) for site in report.sites} == {("q_proj", 2)}
        assert report.error < 0.05 and not report.trained
        again: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        load_adapter(again, tmp_path / f"adapter{dtype}")
        assert again.model.layers[0].self_attn.q_proj.adapters.default.A.dtype == torch.bfloat16


def test_fused_experts(tmp_path: Path) -> None:
    """The files hold each expert's matrices; the model holds one tensor of them all."""
    model = mixtral()
    tuned = tuned_of(model, lambda name, weight: low_rank(name, weight) if "q_proj" in name else None)
    base = saved(model, tmp_path / "base")
    report = extract_lora(base, saved(tuned, tmp_path / "one"), tmp_path / "a")
    assert [site.path.rpartition(".")[2] for site in report.sites] == ["q_proj", "q_proj"] and not report.trained
    tuned = tuned_of(model, lambda name, weight: everywhere(name, weight) if "experts" in name else None)
    report = extract_lora(base, saved(tuned, tmp_path / "two"), tmp_path / "b")
    assert not report.sites and {name.rpartition(".")[2] for name in report.trained} == {"gate_up_proj", "down_proj"}
    again = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(again, tmp_path / "b")
    assert torch.allclose(again(IDS).logits, tuned(IDS).logits, atol=1e-5)


def test_one_module_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    tuned = tuned_of(model, low_rank)
    base, other = saved(model, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    alive: list[weakref.ref[Tensor]] = []
    most, read = 0, Shard.read

    def watched(self: Shard, key: str) -> Tensor:
        nonlocal most
        tensor = read(self, key)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Shard, "read", watched)
    extract_lora(base, other, tmp_path / "adapter")
    assert len(alive) > 20 and most <= 3


def test_convolutions_and_attention(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.depth = nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Conv1d(8, 8, 3, padding=1, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.depth(self.conv(x)).transpose(1, 2)
            return self.attention(hidden, hidden, hidden)[0]

    model, x = Net().eval(), torch.randn(1, 4, 5)
    tuned = tuned_of(model, lambda name, weight: everywhere(name, weight) if weight.dim() > 1 else None)
    report = extract_lora(model, tuned, tmp_path)
    assert {site.weight for site in report.sites} == {"weight", "in_proj_weight", "out_proj.weight"}
    before = model(x)
    load_adapter(model, tmp_path)
    assert torch.allclose(model(x), tuned(x), atol=1e-5) and not torch.allclose(model(x), before, atol=1e-3)


def test_models_are_not_changed(tmp_path: Path) -> None:
    model = llama()
    tuned = tuned_of(model, everywhere)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, tuned)]
    extract_lora(model, tuned, tmp_path, rank=2)
    for m, state in zip((model, tuned), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items()) and list(m.state_dict()) == list(state)
        assert all(p.requires_grad for p in m.parameters())
    (rule, *_) = rules_of_folder(model, tmp_path)
    assert rule.rank == 2


def rules_of_folder(model: Any, folder: Path) -> list[Any]:
    other = copy.deepcopy(model)
    load_adapter(other, folder)
    return list(rules_of(other))


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model, out = llama(), tmp_path / "out"
    tuned = tuned_of(model, everywhere)
    with pytest.raises(SurgeryError, match="equal weights"):
        extract_lora(model, copy.deepcopy(model), out)
    with pytest.raises(SurgeryError, match=r"tensors changed that the LoRA does not hold"):
        extract_lora(model, tuned, out, others="refuse")
    with pytest.raises(SurgeryError, match="others='drop' is not known"):
        extract_lora(model, tuned, out, others="drop")  # type: ignore[arg-type]
    larger = tuned_of(model, everywhere)
    larger.resize_token_embeddings(44)
    with pytest.raises(PlanError, match="in the base and .* in the fine-tune"):
        extract_lora(model, larger, out)
    with pytest.raises(PlanError, match="only the tuned has the tensor"):
        extract_lora(model.model, tuned, out)
    untied = llama(tie_word_embeddings=True)
    with pytest.raises(PlanError, match="shares a tensor that the fine-tune does not"):
        extract_lora(untied, tuned, out)
    with pytest.raises(SurgeryError, match="the tuned has adapters"):
        extract_lora(model, apply_rules(copy.deepcopy(model), LoraRule("q_proj")), out)
    with pytest.raises(SurgeryError, match="no weights"):
        extract_lora(tmp_path, tuned, out)
    norm = tuned_of(model, lambda name, weight: everywhere(name, weight) if name == "model.norm.weight" else None)
    with pytest.raises(SurgeryError, match="would be empty"):
        extract_lora(model, norm, out, others="leave out")
    assert not out.exists()


def test_numbers_that_no_adapter_holds_are_refused(tmp_path: Path) -> None:
    base, out = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path / "out"
    with pytest.raises(SurgeryError, match="not a dtype of a LoRA"):
        extract_lora(base, tuned_of(base, everywhere), out, dtype="bfloat16")  # type: ignore[arg-type]
    large = tuned_of(base, lambda _, weight: torch.full_like(weight, 1e30) if weight.dim() == 2 else None)
    with pytest.raises(PlanError, match=r"change is too large(.|\n)*float16(.|\n)*dtype=torch.float32"):
        extract_lora(base, large, out, dtype=torch.float16)
    diverged = tuned_of(base, lambda name, weight: torch.full_like(weight, math.nan) if name == "1.bias" else None)
    with pytest.raises(PlanError, match="change is not finite"):
        extract_lora(base, diverged, out)
    with pytest.raises(SurgeryError, match="base has no values"):
        extract_lora(copy.deepcopy(base).to("meta"), base, out)
    packed: Any = copy.deepcopy(base)
    packed[0].weight = nn.Parameter(packed[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PlanError, match="float32 in the base and torch.int8 in the fine-tune"):
        extract_lora(base, packed, out)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(SurgeryError, match="the tuned is quantised(.|\n)*gptq"):
        extract_lora(base, tmp_path, out)
    assert not out.exists()


def test_a_fine_tune_in_float8(tmp_path: Path) -> None:
    """The change is that of the numbers in the files."""
    base: Any = nn.Sequential(nn.Linear(4, 4))
    tuned = copy.deepcopy(base)
    tuned[0].weight = nn.Parameter(tuned[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    extract_lora(base, tuned, tmp_path, tolerance=0.0)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(torch.eye(4)), torch.eye(4) @ tuned[0].weight.float().T + base[0].bias)
