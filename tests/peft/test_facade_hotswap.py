"""PEFT's functions for hot-swapping: outputs beside PEFT's, ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import hotswap as theirs  # noqa: E402
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery.peft as ours
from surgery import SurgeryError, SurgeryWarning
from surgery.testing import Snapshot
from tests.support.peers import peft

X = torch.linspace(-1, 1, 24).view(3, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def adapted(seed: int, library: Any = ours, **fields: Any) -> Any:
    model, fields = net(), {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **fields}
    torch.manual_seed(seed)
    return library.get_peft_model(model, library.LoraConfig(**fields)).eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("fields", [
    {}, {"lora_alpha": 32}, {"r": 5}, {"r": 5, "rank_pattern": {"2": 7}}, {"r": 1}, {"target_modules": ["2"]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prepared", [None, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_swap_computes_what_the_folders_adapter_computes(
    fields: dict[str, Any], prepared: int | None, compiled: bool, tmp_path: Path
) -> None:
    if compiled and prepared is None:
        pytest.skip("a compiled model is prepared first")
    other = adapted(2, peft, **fields)
    other.save_pretrained(tmp_path)
    model = adapted(1)
    before = out(model)
    if prepared:
        ours.prepare_model_for_compiled_hotswap(model, target_rank=prepared)
        torch.testing.assert_close(out(model), before)  # sums in another order
    called: Any = torch.compile(model.get_base_model(), backend="eager") if compiled else model
    out(called)
    ours.hotswap_adapter(called, tmp_path, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(out(called), out(other), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(out(called), before)


def test_a_swap_and_pefts_agree_with_two_adapters(tmp_path: Path) -> None:
    adapted(3, peft).save_pretrained(tmp_path / "a")
    adapted(4, peft).save_pretrained(tmp_path / "b")
    outs = []
    for library, swap in ((peft, theirs.hotswap_adapter), (ours, ours.hotswap_adapter)):
        model = library.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
        model.load_adapter(tmp_path / "a", "other")
        swap(model, str(tmp_path / "b"), adapter_name="other", torch_device="cpu")
        outs.append([out(model)])
        model.set_adapter("other")
        outs[-1].append(out(model))
    for mine, expected in zip(outs[1], outs[0], strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


def test_ranks_of_configurations_become_the_target_rank() -> None:
    model = adapted(1, rank_pattern={"2": 3})
    ours.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    config = model.peft_config["default"]
    assert config.r == 6 and config.rank_pattern == {"2": 6}
    assert [tuple(model.get_base_model()[site].adapters.default.A.shape) for site in (0, 2)] == [(6, 8), (6, 12)]
    model.set_requires_grad("default", requires_grad=False)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=9)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ours.prepare_model_for_compiled_hotswap(model)  # scales need nothing


def test_a_key_that_the_adapter_does_not_have_is_named(tmp_path: Path) -> None:
    model = adapted(1, target_modules=["0"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.2.lora_A.weight": torch.zeros(2, 8)}, file)
    for library, swap in ((peft, theirs.hotswap_adapter), (ours, ours.hotswap_adapter)):
        again = library.get_peft_model(net(), library.LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(RuntimeError, match="unexpected keys found: base_model.model.2.lora_A.default.weight"):
            swap(again, str(tmp_path), adapter_name="default")


def test_what_does_not_fit_is_refused_in_pefts_words(tmp_path: Path) -> None:
    adapted(2).save_pretrained(tmp_path / "both")
    loha = ours.get_peft_model(net(), ours.LoHaConfig(target_modules=["0"]))
    loha.save_pretrained(tmp_path / "loha")
    model = adapted(1, target_modules=["0"])
    before = Snapshot(model)
    cases: list[tuple[Any, str, type[Exception], str]] = [
        (
            model,
            "both",
            RuntimeError,
            "Hot swapping the adapter did not succeed",
        ),
        (model, "loha", ValueError, "Incompatible PEFT types found: LORA and LOHA"),
        (loha, "loha", ValueError, "Hotswapping only supports LORA but LOHA was passed"),
        (model, "absent", ValueError, "is not a folder, a file or a repository's name"),
    ]
    for target, folder, kind, match in cases:
        with pytest.raises(kind, match=match) as raised:
            ours.hotswap_adapter(target, tmp_path / folder, "default")
        assert isinstance(raised.value, SurgeryError) and before.differences(model) == []
    with pytest.raises(ValueError, match="there is no adapter 'defualt'"):
        ours.hotswap_adapter(model, tmp_path / "both", "defualt")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged"):
        ours.hotswap_adapter(model, tmp_path / "both", "default")


def test_a_swap_beside_a_merged_adapter(tmp_path: Path) -> None:
    adapted(2).save_pretrained(tmp_path)
    models = [adapted(1, library) for library in (ours, peft)]
    for model, library in zip(models, (ours, peft), strict=True):
        torch.manual_seed(3)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        model.merge_adapter(["other"])
        merged = out(model)
        (ours.hotswap_adapter if library is ours else theirs.hotswap_adapter)(model, str(tmp_path), "default")
        assert torch.equal(out(model), merged)  # it takes no part in a call
        model.unmerge_adapter()
    torch.testing.assert_close(out(models[0]), out(models[1]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out(models[0]), out(adapted(2)), atol=1e-6, rtol=1e-6)


def test_what_can_not_be_prepared() -> None:
    model = adapted(1, r=4)
    with pytest.raises(ValueError, match=r"target rank 3, but the original rank is larger \(4\)"):
        ours.prepare_model_for_compiled_hotswap(model, target_rank=3)
    for empty in (net(), ours.get_peft_model(net(), ours.IA3Config(target_modules=["0"], feedforward_modules=[]))):
        with pytest.raises(ValueError, match="No adapter layers found on the model, make sure call"):
            ours.prepare_model_for_compiled_hotswap(empty, target_rank=6)
    compiled: Any = torch.compile(model.get_base_model(), backend="eager")
    with pytest.raises(ValueError, match=r"Call prepare_model_for_compiled_hotswap \*before\* compiling the model"):
        ours.prepare_model_for_compiled_hotswap(compiled, target_rank=6)
    with pytest.raises(ValueError, match="should be one of 'error', 'warn', or 'ignore', got 'no' instead"):
        ours.prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="no")
    with pytest.warns(SurgeryWarning, match="already compiled. This will likely result in re-compilation"):
        ours.prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="warn")
    ours.prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="ignore")
