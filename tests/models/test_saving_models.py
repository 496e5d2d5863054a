"""Ways to save a trained model: none drops the adapters silently."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LoadError,
    SurgeryWarning,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    deactivate,
    load_adapter,
    load_adapters,
    merge,
    merge_to,
    remove,
    rename_adapter,
    unmerge,
)
from surgery.rules import LoraRule
from tests.support import ROOT
from tests.support.hub_server import hub

transformers: Any = pytest.importorskip("transformers")
accelerate: Any = pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
tiny: Any = pytest.importorskip("tests.support.tiny")
load_file: Any = pytest.importorskip("safetensors.torch").load_file
trainer_module: Any = pytest.importorskip("surgery.trainer")
helpers: Any = pytest.importorskip("tests.models.test_trainer")

REMEDIES = ("save_adapter", "merge_to", "AdapterCheckpoints")


def make_adapted(*names: str, rules: Any = None) -> Any:
    torch.manual_seed(0)
    model = tiny.bert()[0]
    for name in names or ("default",):
        apply_rules(model, rules or [LoraRule("query", rank=2, init="random")], adapter=name)
    return model


def expect_warning(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.warns(SurgeryWarning, match="leaves out its adapters") as issued_warnings:
        call(*args, **kwargs)
    (warning,) = issued_warnings
    assert all(remedy in str(warning.message) for remedy in REMEDIES)
    assert warning.filename == __file__ or "/transformers/" in warning.filename
    return str(warning.message)


# save_pretrained ----------------------------------------------------------------------------------------------


def test_the_base_alone_comes_with_a_warning(tmp_path: Path) -> None:
    model = make_adapted("a", "b")
    assert "'a', 'b'" in expect_warning(model.save_pretrained, tmp_path)
    saved_tensors = load_file(tmp_path / "model.safetensors")
    assert saved_tensors and not any(".adapters." in key for key in saved_tensors)
    assert all(torch.equal(tensor, base_state_dict(model)[key]) for key, tensor in saved_tensors.items())
    expect_warning(model.bert.save_pretrained, tmp_path / "inner")
    model.save_pretrained(tmp_path / "other", is_main_process=False)  # the first process has warned
    merge(model, "a")
    assert "'b'" in expect_warning(model.save_pretrained, tmp_path) and "'a'" not in expect_warning(
        model.save_pretrained, tmp_path
    )
    unmerge(model)
    merge(model)
    model.save_pretrained(tmp_path)
    unmerge(model)
    merge_to(model, tmp_path / "merged", "a")
    deactivate(model)
    expect_warning(model.save_pretrained, tmp_path)
    remove(model)
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)


def test_a_state_dict_that_is_given_stays_whole(tmp_path: Path) -> None:
    """transformers removes excluded keys from the caller's own dict."""
    model = make_adapted()
    for number, prefix in enumerate(("", "module.", "_orig_mod.")):
        state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
        keys = list(state)
        expect_warning(model.save_pretrained, tmp_path / str(number), state_dict=state)
        assert list(state) == keys
        saved_tensors = load_file(tmp_path / str(number) / "model.safetensors")
        assert saved_tensors and not any(".adapters." in key for key in saved_tensors)
    expect_warning(model.save_pretrained, tmp_path, True, model.state_dict())


def test_with_a_compiled_layer_and_a_checkpointed_one(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_adapted()
    layers = model.bert.encoder.layer
    layers[0] = torch.compile(checkpoint_wrapper(layers[0]))
    layers[1] = checkpoint_wrapper(layers[1])
    expect_warning(model.save_pretrained, tmp_path)
    assert not any(".adapters." in key for key in load_file(tmp_path / "model.safetensors"))


def test_copies_pickles_and_methods_set_by_others(tmp_path: Path) -> None:
    model = make_adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.bert)):
        assert vars(twin)["save_pretrained"].module is twin
        expect_warning(twin.save_pretrained, tmp_path)
    again = io.BytesIO()
    torch.save(model, again)
    remove(torch.load(io.BytesIO(again.getvalue()), weights_only=False)).save_pretrained(tmp_path)
    said: list[Any] = []
    plain = tiny.bert()[0]
    plain.save_pretrained = said.append  # as unsloth does
    apply_rules(plain, LoraRule("query", rank=2))
    expect_warning(plain.save_pretrained, tmp_path)
    assert said == [tmp_path]
    remove(plain)
    assert plain.save_pretrained == said.append
    import inspect

    assert "max_shard_size" in inspect.signature(model.save_pretrained).parameters


def test_models_of_other_libraries(tmp_path: Path) -> None:
    hub_of: Any = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub_of.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

    model: Any = apply_rules(Net(), LoraRule("layer", rank=2))
    with pytest.warns(SurgeryWarning, match="where from_pretrained passes them over"):
        model.save_pretrained(tmp_path)
    assert any(".adapters." in key for key in load_file(tmp_path / "model.safetensors"))


# Whole state dicts --------------------------------------------------------------------------------------------


def test_state_dicts_hold_the_adapters(tmp_path: Path) -> None:
    model = make_adapted()
    expected = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    torch.save(model.state_dict(), tmp_path / "model.pt")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_model(prepared, tmp_path / "model")
    accelerator.save_state(tmp_path / "state")
    unwrapped = accelerator.unwrap_model(prepared)
    expect_warning(unwrapped.save_pretrained, tmp_path / "base", state_dict=accelerator.get_state_dict(prepared))
    for state in (torch.load(tmp_path / "model.pt"), load_file(tmp_path / "model" / "model.safetensors")):
        other = make_adapted()
        with torch.no_grad():
            [tensor.zero_() for tensor in adapter_state_dict(other).values()]
        other.load_state_dict(state, strict=False)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(other).items())
    with torch.no_grad():
        [tensor.zero_() for tensor in adapter_state_dict(model).values()]
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(model).items())
    with pytest.raises(LoadError, match="has the tensors of adapters, but not their rules"):
        load_adapter(remove(model), tmp_path / "model")


# The Trainer --------------------------------------------------------------------------------------------------


def train_two_steps(folder: Path, model: Any, **settings: Any) -> Any:
    trainer = helpers.trainer_of(model, folder, max_steps=2, save_steps=1, **settings)
    trainer.train()
    return trainer


def test_several_adapters_and_a_limit(tmp_path: Path) -> None:
    model = make_adapted("default", "b")
    trainer = train_two_steps(tmp_path, model, save_total_limit=1)
    (place,) = tmp_path.glob("checkpoint-*")
    trainer.save_model(tmp_path / "end")
    for folder in (place, tmp_path / "end"):
        again = remove(copy.deepcopy(model))
        assert list(load_adapters(again, folder)) == ["default", "b"]
        for name in ("default", "b"):
            mine, theirs = adapter_state_dict(model, name), adapter_state_dict(again, name)
            assert mine.keys() == theirs.keys() and all(torch.equal(t, theirs[key]) for key, t in mine.items())
    assert (place / "model.safetensors").exists() and not (tmp_path / "end" / "model.safetensors").exists()
    rename_adapter(model, "default", "a")
    trainer.save_model(tmp_path / "other")
    with pytest.raises(LoadError, match=r"its subfolders hold a, b\n.*subfolder='a'"):
        load_adapter(remove(copy.deepcopy(model)), tmp_path / "other")


def test_one_adapter_stands_in_the_folder_whatever_its_name(tmp_path: Path) -> None:
    model = make_adapted("topics")
    trainer = train_two_steps(tmp_path, model)
    for folder in (tmp_path / "checkpoint-2", tmp_path / "end"):
        trainer.save_model(tmp_path / "end")
        load_adapter(again := remove(copy.deepcopy(model)), folder, "x")
        mine, theirs = adapter_state_dict(model, "topics"), adapter_state_dict(again, "x")
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def test_what_trains_of_the_base_is_kept_or_told(tmp_path: Path) -> None:
    model = make_adapted()
    model.classifier.requires_grad_(True)
    trainer = train_two_steps(tmp_path, model)
    saved_tensors = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved_tensors["classifier.weight"], model.classifier.weight)
    again = make_adapted()
    again.classifier.requires_grad_(True)
    resumed = helpers.trainer_of(again, tmp_path, max_steps=3, save_strategy="no")
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.warns(SurgeryWarning, match="2 trained tensors are not in .*: classifier.weight, classifier.bias"):
        trainer.save_model(tmp_path / "end")
    with pytest.warns(SurgeryWarning, match="1 trained tensors are not in .*: value_head.weight"):
        adapted_alone = make_adapted()
        helpers.trainer_of(adapted_alone, tmp_path)
        adapted_alone.save_pretrained(
            tmp_path / "end", state_dict={**adapted_alone.state_dict(), "value_head.weight": torch.ones(1)}
        )
    with pytest.warns(SurgeryWarning, match="no adapter is written"):
        adapted_alone.save_pretrained(tmp_path / "end", state_dict={})


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_resuming_where_the_base_was_changed_at_the_start(family: str, tmp_path: Path) -> None:
    """PiSSA changes base weights: a checkpoint contains exactly these weights of the base, also for a tied model."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()[0]
    targets = "c_attn" if family == "gpt2" else "query"
    start = copy.deepcopy(model)
    apply_rules(model, LoraRule(targets, rank=2, init="pissa"))
    trainer_of = helpers.trainer_of
    trainer_of(model, tmp_path)
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    model.save_pretrained(place)
    saved_tensors = load_file(place / "model.safetensors")
    sites = {key.partition(".adapters.")[0] for key in saved_tensors if ".adapters." in key}
    weights = {name for name in model.state_dict() if name.endswith("weight") and ".adapters." not in name}
    assert {name for name in saved_tensors if name in weights} == {f"{site}.weight" for site in sites}
    other = apply_rules(copy.deepcopy(start), LoraRule(targets, rank=2, init="pissa"))
    with torch.no_grad():
        [parameter.add_(1) for name, parameter in other.named_parameters() if name in saved_tensors]
    trainer_of(other, tmp_path)._load_from_checkpoint(str(place))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


class Plain(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(99, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(self.embed(input_ids).mean(1))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels),
                                                         "logits": logits}  # fmt: skip


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Plain()
    model = apply_rules(copy.deepcopy(base), LoraRule("layer", rank=2))
    train_two_steps(tmp_path, model)
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == {
        "layer.adapters.default.A", "layer.adapters.default.B",
    }  # fmt: skip
    load_adapter(again := copy.deepcopy(base), tmp_path / "checkpoint-2")
    ids = helpers.Sentences().ids
    assert torch.equal(again(ids)["logits"], model(ids)["logits"])
    other = apply_rules(copy.deepcopy(base), LoraRule("layer", rank=2))
    helpers.trainer_of(other, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(other(ids)["logits"], model(ids)["logits"])


def test_strict_loading_still_misses_adapters() -> None:
    model = make_adapted()
    helpers.trainer_of(model, Path("unused"))
    adapter_tensors = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." in key}
    model.load_state_dict(adapter_tensors)
    first = next(iter(adapter_tensors))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: tensor for key, tensor in adapter_tensors.items() if key != first})
    whole = model.state_dict()
    del whole["classifier.bias"]
    with pytest.raises(RuntimeError, match="classifier.bias"):
        model.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="Missing key"):
        remove(model).load_state_dict(adapter_tensors)


# The hub ------------------------------------------------------------------------------------------------------

PUSH = """
import sys, warnings
from pathlib import Path
import torch
from surgery.rules import LoraRule
from surgery import adapter_state_dict, apply_rules, load_adapter
from surgery.trainer import AdapterCheckpoints
from tests.models import test_trainer as helpers
from tests.support import tiny

def make_adapted(*names):
    torch.manual_seed(0)
    model = tiny.bert()[0]
    for name in names:
        apply_rules(model, [LoraRule("query", rank=2, init="random")], adapter=name)
    return model

def check(model, repo, name, **where):
    torch.manual_seed(0)
    load_adapter(other := tiny.bert()[0], repo, name, **where)
    mine, theirs = adapter_state_dict(model, name), adapter_state_dict(other, name)
    assert mine and all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), repo

out = Path(sys.argv[1])
model = make_adapted("topics")
trainer = helpers.trainer_of(model, out / "one", max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="me/one",
                             hub_strategy="all_checkpoints", hub_token="hf_x", hub_always_push=True)
trainer.train()
trainer._finish_current_push()
check(model, "me/one", "topics")
check(model, "me/one", "topics", subfolder="checkpoint-2")
trainer.push_to_hub()
check(model, "me/one", "topics")
model.push_to_hub("me/two", token="hf_x")
check(model, "me/two", "topics")
model.save_pretrained(out / "three", push_to_hub=True, repo_id="me/three", token="hf_x")
check(model, "me/three", "topics")
model = make_adapted("default", "b")
trainer = helpers.trainer_of(model, out / "four", max_steps=1, save_steps=1, push_to_hub=True, hub_model_id="me/four",
                             hub_token="hf_x")
trainer.train()
trainer._finish_current_push()
check(model, "me/four", "default")
check(model, "me/four", "b", subfolder="b")
model.push_to_hub("me/five", token="hf_x")
check(model, "me/five", "b", subfolder="b")
model = make_adapted("default")
with warnings.catch_warnings(record=True) as issued_warnings:
    warnings.simplefilter("always")
    model.push_to_hub("me/base", token="hf_x")
assert any("leaves out its adapters" in str(warning.message) for warning in issued_warnings)
"""


@pytest.mark.slow("tests/storage/test_hub.py pushes and loads")
def test_pushed_to_the_hub(tmp_path: Path) -> None:
    with hub() as (endpoint, uploads):
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path)], env={**os.environ, **settings},
            cwd=ROOT, text=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = {name: set(files) for name, files in uploads.items()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names["me/one"]
    for name, files in names.items():
        assert ("config.json" in files) == (name == "me/base"), files
    assert "model.safetensors" not in names["me/two"] | names["me/three"] | names["me/five"]
