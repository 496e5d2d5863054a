"""What all commands share: JSON, errors, exit codes, near misses; and the commands `rules` and `doctor`."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path

import pytest

import surgery
from surgery import rules as library
from surgery.commands import new_files
from surgery.commands.app import COMMANDS
from surgery.rules import rewrites
from tests.support.command_line import Files, run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_help_with_an_example_and_takes_json(command: object) -> None:
    name = getattr(command, "__name__", "")
    done = run(name, "--help")
    assert done.code == 0 and "--json" in done.out and "--traceback" in done.out and f"surgery {name}" in done.out


def test_wrong_words_get_near_misses_and_exit_code_2() -> None:
    wrong = run("exprot")
    assert wrong.code == 2 and "Did you mean 'export'?" in wrong.err
    option = run("rules", "--jsn")
    assert option.code == 2 and "--json" in option.err
    assert run("merge", "only-one").code == 2


def test_errors_are_texts_or_json_and_traceback_shows_more(files: Files) -> None:
    plain = run("rules", "lroa")
    assert plain.code == 1 and plain.err.startswith("error: 'lroa' is not the name of a rule") and not plain.out
    unlike = run("rules", "zzzzq").err  # no name is near: all are listed, without those of exported files alone
    assert " lora," in unlike and "-slot" not in unlike
    assert "Traceback" not in plain.err and "Traceback" in run("rules", "lroa", "--traceback").err
    data = run("rules", "lroa", "--json").data
    assert data["error"]["type"] == "RuleError" and "lora" in data["error"]["why"]
    problems = run("merge", files.model, files.model, "--out", files.folder / "m", "--json").data["error"]
    assert problems["type"] == "LoadError" and problems["problems"]


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.authoring import rule_names

    monkeypatch.setattr(rule_names, "registered", lambda name: 1 / 0)
    done = run("rules", "lora")
    assert done.code == 1 and "ZeroDivisionError" in done.err and "--traceback" in done.err


def test_the_version() -> None:
    assert run("--version").out == f"surgery {surgery.__version__}\n"


def test_the_script_is_declared() -> None:
    from tests.support import ROOT

    assert 'surgery = "surgery.commands.main:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_all_rules_and_their_fields_are_listed() -> None:
    listed = {rule["class"]: rule for rule in run("rules", "--json").data["rules"]}
    packages = (library, rewrites)
    kinds = {name: getattr(package, name) for package in packages for name in package.__all__ if name.endswith("Rule")}
    assert listed.keys() == kinds.keys()
    for name, kind in kinds.items():
        fields = {field["name"]: field for field in listed[name]["fields"]}
        assert list(fields) == [field.name for field in dataclasses.fields(kind)] and listed[name]["doc"]
        assert all(field["doc"] for field in fields.values()), (name, [f for f in fields.values() if not f["doc"]])
    one = run("rules", "lora")
    assert "rows of A, columns of B" in one.out and "LoraRule" in one.out


def test_the_shell_completes_commands_and_rules() -> None:
    from typer.testing import CliRunner

    from surgery.commands.app import app

    for words, expected in (("surgery in", ["inspect"]), ("surgery rules lo", ["loha", "lokr", "lora"])):
        environment = {"_SURGERY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = CliRunner().invoke(app, [], prog_name="surgery", env=environment)
        assert done.stdout.split() == expected


def test_doctor_lists_packages_extras_and_devices() -> None:
    done = run("doctor", "--json")
    data = done.data
    assert done.code == 0 and data["ok"] and data["surgery"] == surgery.__version__
    packages = {each["package"]: each["version"] for each in data["packages"]}
    assert packages["torch"] == metadata.version("torch") and data["devices"][0]["device"] == "cpu"
    assert {"onnx", "yaml"} <= {extra["extra"] for extra in data["extras"]}


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_files.new_folder(tmp_path / "a" / "b") as place:
        (place / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with new_files.new_folder(tmp_path / "empty") as place:
        (place / "file").write_text("whole")
    assert (tmp_path / "empty" / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_wrong_arguments_are_json_as_well() -> None:
    absent = run("inspect", "--json")
    assert absent.code == 2 and absent.err == ""
    assert "Missing argument 'PATH'" in absent.data["error"]["text"]
    assert "surgery inspect --help" in absent.data["error"]["text"]
    unknown = run("plan", "a", "b", "--json", "--foo")
    assert unknown.code == 2 and "No such option: --foo" in unknown.data["error"]["text"]
    assert run("no-command", "--json").code == 2
    helped = run("inspect", "--help", "--json")
    assert helped.code == 0 and "Usage" in helped.out


def test_problems_of_a_plan_are_objects(files: Files, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("- rule: prefix\n  length: 3\n  targets: attention.self\n")
    done = run("plan", files.model, tmp_path / "rules.yaml", "--json")
    (problem,) = done.data["problems"]
    assert done.code == 1 and problem["type"] == "SiteError" and problem["where"].endswith("attention.self")
    assert problem["fix"] == "--with-example, or --example FILE.safetensors" and problem["text"]
