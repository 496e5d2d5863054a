"""Files for the tests of commands, made once."""

from __future__ import annotations

import pytest

from tests.support.command_line import Files, make_files

pytest.importorskip("typer")
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))
