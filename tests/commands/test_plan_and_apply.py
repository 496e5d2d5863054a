"""`surgery plan` and `surgery apply`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import apply_rules, load_adapter, plan_rules, rules_from_yaml
from tests.support.command_line import RULES, Files, run


def test_a_plan_is_that_of_plan_rules_and_reads_no_weights(files: Files, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((files.model / "config.json").read_bytes())
    done = run("plan", tmp_path, files.rules, "--json")
    expected = plan_rules(files.load(), rules_from_yaml(RULES))
    assert done.code == 0 and done.data["steps"] == expected.to_dict()["steps"]
    base = sum(parameter.numel() for parameter in files.load().parameters())
    assert done.data["parameters"] == {"base": base, "added": 256, "trainable": 256}
    assert str(expected) in run("plan", tmp_path / "config.json", files.rules).out


def test_problems_are_printed_and_the_exit_code_is_1(files: Files, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('[{"rule": "lora", "version": 1, "targets": ["qurey"]}]')
    done = run("plan", files.model, tmp_path / "rules.json")
    assert done.code == 1 and "qurey" in done.out and "did you mean" in done.out


def test_rules_from_the_standard_input(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from surgery.commands.app import app

    done = CliRunner().invoke(app, ["plan", str(files.model), "-"], input=RULES)
    assert done.exit_code == 0 and "2 edits" in done.stdout


def test_rules_that_name_code_need_trust(files: Files, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("- {rule: replace, targets: [classifier], by: torch.nn.Identity}\n")
    done = run("plan", files.model, tmp_path / "x.yaml")
    assert done.code == 1 and "--trust" in done.err


@pytest.mark.parametrize(
    "text, part",
    [("- {rule: lroa}", "did you mean"), ("rule: lora", "list of mappings"), ("[]", "no rules"), ("{", "not YAML")],
)
def test_errors_of_a_file_of_rules_name_it(text: str, part: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    done = run("plan", files.model, tmp_path / "x.yaml")
    assert done.code == 1 and part in done.err and "x.yaml" in done.err


def test_models_that_are_not_models(files: Files, tmp_path: Path) -> None:
    assert "there is no config.json" in run("plan", tmp_path, files.rules).err
    (tmp_path / "config.json").write_text("{}")
    assert "it has no model_type" in run("plan", tmp_path, files.rules).err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in run("plan", tmp_path, files.rules).err
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "nothing", "architectures": ["NothingModel"]}')
    assert "transformers can't read" in run("plan", tmp_path, files.rules).err
    wrong = run("plan", files.model, files.rules, "--class", "BertForSequenceClasification")
    assert wrong.code == 1 and "did you mean 'BertForSequenceClassification'" in wrong.err
    for name, why in (
        ("PreTrainedModel", "it is a base class"),
        ("BertPreTrainedModel", "it is a base class"),
        ("LlamaForCausalLM", "the class takes LlamaConfig, and the file is BertConfig"),
    ):
        done = run("plan", files.model, files.rules, "--class", name)
        assert done.code == 1 and f"{name} does not fit" in done.err and f"why:   {why}" in done.err
        assert "fix:   --class Bert" in done.err and "BertPreTrainedModel" not in done.err.partition("fix:")[2]
    other = run("plan", files.model, files.rules, "--class", "BertForMaskedLM", "--json")
    assert other.data["model"] == "BertForMaskedLM"


def test_apply_writes_the_adapter_that_the_functions_make(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "new"
    done = run("apply", files.model, files.rules, "--out", out, "--seed", "3", "--json")
    assert done.code == 0 and done.data["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    torch.manual_seed(3)
    expected = apply_rules(files.load(), rules_from_yaml(RULES))
    stored = load_file(out / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in expected.named_parameters() if ".adapters." in name}
    assert len(stored) == len(tensors) and load_adapter(files.load(), out)
    again = run("apply", files.model, files.rules, "--out", out)
    assert again.code == 1 and "exists already" in again.err


def test_apply_writes_a_merged_model_or_nothing(files: Files, tmp_path: Path) -> None:
    dry = run("apply", files.model, files.rules, "--out", tmp_path / "new", "--dry-run", "--json")
    assert dry.code == 0 and dry.data["written"] is False and list(tmp_path.iterdir()) == []
    done = run("apply", files.model, files.rules, "--out", tmp_path / "new", "--merged")
    assert done.code == 0 and files.load(tmp_path / "new")
    (tmp_path / "bad.yaml").write_text("- {rule: lora, targets: [qurey]}")
    assert run("apply", files.model, tmp_path / "bad.yaml", "--out", tmp_path / "bad").code == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("command", ["plan", "apply", "apply --dry-run"])
def test_rules_that_need_an_example_get_one(command: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "prefix.yaml").write_text("- {rule: prefix, targets: [self], length: 2}")
    words = [*command.split(), files.model, tmp_path / "prefix.yaml"]
    words += ["--out", tmp_path / "a"] if "apply" in command else []
    without = run(*words)
    text = without.out + without.err
    assert without.code == 1 and "needs an example call" in text and "example_inputs" not in text
    assert "fix:   --with-example, or --example FILE.safetensors\n" in text
    assert run(*words, "--with-example").code == 0


def test_an_example_that_fails_is_told_in_options(files: Files, tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(1, 5)}, tmp_path / "x.safetensors")  # floats are not ids
    done = run("plan", files.model, files.rules, "--example", tmp_path / "x.safetensors")
    assert done.code == 1 and "the example call fails" in done.out
    assert "fix:   --example FILE.safetensors, with the tensors of one call by name" in done.out


def test_tied_weights_are_merged_with_an_option(files: Files, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("- {rule: lora, targets: [decoder], rank: 2, init: random}")
    words = ["apply", files.model, tmp_path / "x.yaml", "--class", "BertForMaskedLM", "--out", tmp_path / "new"]
    refused = run(*words, "--merged")
    assert refused.code == 1 and "fix:   --untie gives the site a weight of its own" in refused.err, refused.err
    assert "add --merged" in run(*words, "--untie").err
    assert not (tmp_path / "new").exists() and run(*words, "--merged", "--untie").code == 0
