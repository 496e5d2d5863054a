"""docs/reference/command-line.md: its commands print what the page shows, in its order and in one folder."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest

from surgery.commands.app import COMMANDS
from tests.support import ROOT
from tests.support.command_line import Files, run

PAGE = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")


def test_the_commands_print_what_the_page_shows(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    shutil.copytree(files.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n\$ surgery (.+)\n((?:.*\n)*?)```", PAGE)
    assert {words.split()[0] for words, _ in blocks} == {command.__name__ for command in COMMANDS}
    for words, expected in blocks:
        done = run(*words.split())
        assert done.code == 0, done
        same = doctest.OutputChecker().check_output(expected, done.out, doctest.ELLIPSIS)
        assert same, f"surgery {words} prints\n{done.out}\nand the page shows\n{expected}"


def test_every_command_has_a_section_and_a_row() -> None:
    for command in COMMANDS:
        assert f"\n## {command.__name__}\n" in PAGE and f"| `surgery {command.__name__}" in PAGE
