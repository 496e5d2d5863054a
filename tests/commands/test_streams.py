"""The command's streams: other encodings, closed or full streams, and readers that leave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.command_line import Files, run_forked

ENCODING = "sys.{stream} = open(sys.{stream}.fileno(), 'w', encoding='ascii', closefd=False)"


@pytest.fixture
def adapter(files: Files, tmp_path: Path) -> Path:
    place = tmp_path / "é 名前"
    place.symlink_to(files.peft)
    return place


def test_letters_that_the_encoding_lacks_are_escaped(adapter: Path, tmp_path: Path) -> None:
    before = ENCODING.format(stream="stdout")
    text = run_forked("inspect", adapter, folder=tmp_path, before=before)
    assert text.code == 0 and "\\xe9 \\u540d" in text.out, text
    data = run_forked("inspect", adapter, "--json", folder=tmp_path, before=before)
    assert data.code == 0 and json.loads(data.out)["path"] == str(adapter), data
    before = ENCODING.format(stream="stderr")
    error = run_forked("inspect", tmp_path / "ü", folder=tmp_path, before=before)
    assert error.code == 1 and "\\xfc does not exist" in error.err, error


def test_a_name_that_is_not_utf8(files: Files, tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    try:
        os.symlink(files.peft, place)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    data = run_forked("inspect", place, "--json", folder=tmp_path)
    assert data.code == 0 and json.loads(data.out)["path"] == place, data
    assert run_forked("inspect", place, folder=tmp_path).code == 0


@pytest.mark.parametrize("words", [["rules"], ["rules", "--json"], ["rules", "no"]], ids=str)
def test_closed_streams(words: list[str], tmp_path: Path) -> None:
    done = run_forked(*words, folder=tmp_path, before="sys.stdout = None")
    assert done.code == (1 if "no" in words else 0) and "Traceback" not in done.err
    done = run_forked(*words, folder=tmp_path, before="sys.stderr = None")
    assert done.code == (1 if "no" in words else 0) and "is not the name of a rule" not in done.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("words", [["rules", "lora"], ["rules", "--json"]], ids=str)
def test_output_that_can_not_be_written(words: list[str], tmp_path: Path) -> None:
    before = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); sys.stdout = open(1, 'w', closefd=False)"
    done = run_forked(*words, folder=tmp_path, before=before)
    assert done.code == 1 and done.err.startswith("error: the output can't be written"), done
    assert "Traceback" not in done.err and "Exception ignored" not in done.err


@pytest.mark.parametrize("words", [["rules", "lora"], ["rules"], ["rules", "--json"]], ids=str)
def test_a_reader_that_leaves(words: list[str], tmp_path: Path) -> None:
    before = "import os; ends = os.pipe(); os.close(ends[0]); os.dup2(ends[1], 1); sys.stdout = open(1, 'w')"
    done = run_forked(*words, folder=tmp_path, before=before)
    assert done.code == 1 and not done.err, done
