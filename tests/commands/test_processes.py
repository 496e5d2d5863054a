"""Every command through a real process: output, exit codes, Ctrl-C, and what stays in the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import merge_files
from tests.support.command_line import Files, Result, run_apart, run_forked


def tuned(files: Files) -> Path:
    """A fine-tune of the model: one weight differs."""
    place = files.folder / "tuned"
    if not place.exists():
        shutil.copytree(files.model, place)
        tensors = load_file(place / "model.safetensors")
        tensors["bert.encoder.layer.0.attention.self.query.weight"][0] += 1
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def merged_with_record(files: Files) -> Path:
    """A merged model with the records to unmerge it."""
    merged = files.folder / "merged with record"
    if not merged.exists():
        merge_files(files.model, files.peft, merged, keep_record=True)
    return merged


COMMANDS: dict[str, tuple[Callable[[Files], list[object]], str]] = {
    "inspect": (lambda files: ["inspect", files.peft], "lora_A[4, 16]"),
    "plan": (lambda files: ["plan", files.model, files.rules], "2 edits, 256 trainable parameters"),
    "apply": (lambda files: ["apply", files.model, files.rules, "--out", "new"], "an adapter of 256 parameters"),
    "merge": (lambda files: ["merge", files.model, files.peft, "--out", "merged"], "with news merged"),
    "unmerge": (lambda files: ["unmerge", merged_with_record(files), "--out", "base"], "have the bits of the base's"),
    "check": (lambda files: ["check", files.peft, "--target", "openvino"], "OpenVINO GenAI 2026.4.1 takes"),
    "convert": (lambda files: ["convert", files.peft, "--to", "mlx", "--out", "mlx"], "2 modules, peft to mlx"),
    "extract": (lambda files: ["extract", files.model, tuned(files), "--out", "new"], "LoRA at 1 weights, rank 1"),
    "export": (lambda files: ["export", files.model, files.peft, "--out", "m.onnx", "--no-verify"], "merged; "),
    "diff": (lambda files: ["diff", files.peft, files.ours], "other shape [4, 16] and [2, 16]"),
    "rules": (lambda files: ["rules", "lora"], "rank"),
    "doctor": (lambda files: ["doctor"], "apply, merge, remove on cpu"),
    "bench": (lambda files: ["bench", files.model, "--rounds", "1", "--length", "4"], "call, merged"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_as_a_process(name: str, files: Files, tmp_path: Path) -> None:
    words, expected = COMMANDS[name]
    done = run_forked(*words(files), folder=tmp_path)
    assert (done.code, expected in done.out) == (0, True), done
    assert not list(tmp_path.glob(".*"))


def test_every_command_is_listed_here() -> None:
    from surgery.commands.app import COMMANDS as ALL

    assert set(COMMANDS) == {command.__name__ for command in ALL}


def test_a_new_process_starts_without_torch(files: Files, tmp_path: Path) -> None:
    code = """
import sys
from surgery.commands.main import main
try:
    main()
finally:
    assert not {"torch", "transformers", "numpy", "onnx"} & set(sys.modules)
"""
    helped = run_apart("--help", folder=tmp_path, code=code)
    assert helped.code == 0 and all(name in helped.out for name in COMMANDS)
    described = run_apart("inspect", files.ours, "--json", folder=tmp_path, code=code)
    assert described.code == 0 and described.data["ranks"] == {"2": 2}


def test_python_m_and_usage_errors(tmp_path: Path) -> None:
    wrong = run_apart("inspekt", folder=tmp_path)
    assert wrong.code == 2 and "Did you mean 'inspect'?" in wrong.err and not wrong.out


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from surgery.commands.main import main; main()"
    done = run_apart(folder=tmp_path, code=code)
    assert done.code == 1 and "pip install 'model-surgery[cli]'" in done.err and "Traceback" not in done.err


# Ctrl-C ---------------------------------------------------------------------------------------------------------

# Sends the process a signal after a call of a function, as Ctrl-C at that moment does.
BEFORE = """
import importlib, os, signal
module = importlib.import_module({module!r})
function = getattr(module, {name!r})
def interrupted(*args, **kwargs):
    done = function(*args, **kwargs)
    setattr(module, {name!r}, function)
    os.kill(os.getpid(), signal.{signal})
    return done
setattr(module, {name!r}, interrupted)
"""


def interrupted(words: list[object], place: str, folder: Path, signal: str = "SIGINT") -> Result:
    module, _, name = place.partition(":")
    return run_forked(*words, folder=folder, before=BEFORE.format(module=module, name=name, signal=signal))


@pytest.mark.parametrize(
    "command, place",
    [
        ("plan", "surgery.commands.example_call:model_on_meta"),
        ("apply", "surgery.commands.example_call:load_model"),
        ("apply", "surgery.adapter_files.tensor_files:write_safetensors"),
        ("merge", "surgery.storage.merged_checkpoint:_merge"),
        ("merge", "surgery.storage.merged_checkpoint:_copy_tokenizer"),
        ("export", "surgery.commands.example_call:example_call"),
        ("diff", "surgery.commands.diff:_tensors"),
        ("bench", "surgery.commands.bench:load_model"),
    ],
)
def test_ctrl_c_leaves_nothing_behind(command: str, place: str, files: Files, tmp_path: Path) -> None:
    loaded = ["--with-example"] if "merged_checkpoint" in place else []
    done = interrupted([*COMMANDS[command][0](files), *loaded], place, tmp_path)
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err, done
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_result_is_renamed_leaves_it_whole(files: Files, tmp_path: Path) -> None:
    done = interrupted(COMMANDS["merge"][0](files), "os:rename", tmp_path)
    assert done.code == 130 and [file.name for file in tmp_path.iterdir()] == ["merged"]
    assert files.load(tmp_path / "merged").num_parameters() == files.load().num_parameters()


def test_sigterm_leaves_nothing_behind(files: Files, tmp_path: Path) -> None:
    words = [*COMMANDS["merge"][0](files), "--with-example"]
    done = interrupted(words, "surgery.storage.merged_checkpoint:_copy_tokenizer", tmp_path, "SIGTERM")
    assert done.code == 143 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_merge_of_files_goes_on_after_it_was_stopped(signal: str, code: int, files: Files, tmp_path: Path) -> None:
    words = COMMANDS["merge"][0](files)
    done = interrupted(words, "surgery.checkpoints.shard_rewriting:_write_shard", tmp_path, signal)
    assert done.code == code and [file.name for file in tmp_path.iterdir()] == [".merged.unfinished"]
    done = run_forked(*words, "--json", folder=tmp_path)
    assert done.code == 0 and done.data["streamed"] and [file.name for file in tmp_path.iterdir()] == ["merged"]


def test_folders_above_the_result_go_with_it(files: Files, tmp_path: Path) -> None:
    words: list[object] = ["apply", files.model, files.rules, "--out", "a/b/new"]
    done = interrupted(words, "surgery.adapter_files.tensor_files:write_safetensors", tmp_path)
    assert done.code == 130 and list(tmp_path.iterdir()) == []


# What is written ------------------------------------------------------------------------------------------------


def test_merge_writes_the_model_that_the_functions_give(files: Files, tmp_path: Path) -> None:
    from surgery import load_adapter, merge

    done = run_forked("merge", files.model, files.peft, "--out", "merged", "--json", folder=tmp_path)
    assert done.code == 0 and done.data["model"] == "BertForSequenceClassification"
    expected, found = files.load(), files.load(tmp_path / "merged")
    load_adapter(expected, files.peft)
    merge(expected)
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, found(ids).logits)
