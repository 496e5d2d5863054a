"""What lowering does to numbers, the arguments of `save_adapter(target=…)`, and files beside PEFT."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from surgery import (
    SurgeryError,
    TargetProfile,
    apply_rules,
    check_target,
    load_adapter,
    register_target,
    save_adapter,
)
from surgery.rules import IA3Rule, LoraRule
from surgery.serving import profile as registry
from tests.support.small_llama import llama, logits


def toy(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


@pytest.mark.parametrize("alpha, exact", [(8, True), (3, False)])
def test_a_scale_is_multiplied_into_b(alpha: float, exact: bool, tmp_path: Path) -> None:
    rule = LoraRule(["0", "2"], rank=2, alpha=2, alpha_pattern={"2": alpha}, init="random")
    model = apply_rules(toy(), rule)
    site = check_target(model, "openvino").sites[1]
    assert ("exact" in site.how) == exact and (site.error == 0.0) == exact and site.error < 2**-24
    save_adapter(model, tmp_path, target="openvino")
    tensors = load_file(tmp_path / "openvino_lora.safetensors")
    B = model.get_parameter("2.adapters.default.B").detach()
    assert torch.equal(tensors["base_model.model.2.lora_B.weight"], (B.double() * alpha / 2).float())


def test_lora_in_half_precision_is_written_in_float32(tmp_path: Path) -> None:
    """PEFT's files can't say that a LoRA computes in bfloat16, so its numbers are written, which float32 has."""
    model = apply_rules(toy(torch.bfloat16), LoraRule("0", rank=2, alpha=3, init="random", dtype="bfloat16"))
    save_adapter(model, tmp_path, target="openvino")
    A, B = (load_file(tmp_path / "openvino_lora.safetensors")[f"base_model.model.0.lora_{n}.weight"] for n in "AB")
    own = [model.get_parameter(f"0.adapters.default.{n}").detach().float() for n in "AB"]
    assert A.dtype == torch.float32
    torch.testing.assert_close(B @ A, 1.5 * own[1] @ own[0], rtol=1e-6, atol=1e-7)


def test_dtypes_that_a_program_does_not_read_are_cast(tmp_path: Path) -> None:
    model = apply_rules(toy(torch.float64), LoraRule("0", rank=2, alpha=2, init="random"))
    assert "A is cast from float64 to float32" in check_target(model, "openvino").sites[0].how
    save_adapter(model, tmp_path, target="openvino")
    assert {tensor.dtype for tensor in load_file(tmp_path / "openvino_lora.safetensors").values()} == {torch.float32}


def test_a_rank_that_is_too_high_needs_the_callers_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_profiles", dict(registry._profiles))
    register_target(TargetProfile("small", "Small", "1", format="peft", largest_rank=2))
    model = apply_rules(nn.Sequential(nn.Linear(8, 8, bias=False)), IA3Rule("0", init="random"))
    report = check_target(model, "small")
    assert not report and "rank=2" in str(report.remedies)
    with pytest.raises(SurgeryError, match="higher than Small's largest one"):
        save_adapter(model, tmp_path / "a", target="small")
    report = check_target(model, "small", rank=2, example_inputs=torch.randn(4, 8))
    assert report and 0 < report.error < 1 and len(report.outputs) == 1
    save_adapter(model, tmp_path / "a", target="small", rank=2)
    assert load_file(tmp_path / "a/adapter_model.safetensors")["base_model.model.0.lora_A.weight"].shape == (2, 8)
    with pytest.raises(SurgeryError, match="there is a target 'small' already"):
        register_target(TargetProfile("small", "Other", "1", format="peft"))


def test_arguments(tmp_path: Path) -> None:
    model = apply_rules(toy(), LoraRule("0", rank=2))
    for words, options in {
        "there is no target 'vlm'": {"target": "vlm"},
        "reads the format 'openvino'": {"target": "openvino", "format": "mlx"},
        "rank and tolerance belong to a target": {"rank": 2},
        "has no place for metadata": {"target": "openvino", "metadata": {"a": 1}},
    }.items():
        with pytest.raises(SurgeryError, match=words):
            save_adapter(model, tmp_path / "new", **options)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="a format holds one adapter"):
        save_adapter(model, tmp_path / "new", ["default"])
    assert not (tmp_path / "new").exists()


def test_a_refusal_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    model = apply_rules(toy(), LoraRule("0", rank=2))
    save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SurgeryError, match="does not have the class Sequential"):
        save_adapter(model, tmp_path, target="vllm")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_labels_and_the_base_are_in_the_header(tmp_path: Path) -> None:
    model = apply_rules(llama(), LoraRule("q_proj", rank=2, init="random"))
    save_adapter(model, tmp_path, target="vllm", metadata={"accuracy": 0.5}, licence="mit")
    report = load_adapter(llama(), tmp_path)
    assert report.metadata == {"accuracy": 0.5} and report.licence == "mit"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_peft_loads_what_programs_with_its_format_get(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rule = LoraRule(["q_proj", "down_proj"], rank=4, alpha=6, rank_pattern={"q_proj": 2}, rslora=True, init="random")
    model = apply_rules(llama(), rule)
    wanted = logits(model)
    for target in ("vllm", "sglang", "tensorrt-llm"):
        save_adapter(model, tmp_path / target, target=target)
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / target)).eval()
        torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-6, msg=target)
