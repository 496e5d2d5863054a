"""The wheel that is built from this tree holds what it should, and works in an environment that has nothing else."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests.reports import release
from tests.support import ROOT, distribution
from tests.support.distribution import run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("build", "pip"):
        if not distribution.major(package):
            pytest.skip(f"needs {package}: pip install -e '.[dev]'")
    tree = tmp_path_factory.mktemp("tree")
    distribution.copy_sources(tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distribution.build(tree, tmp_path_factory.mktemp("dist"), "wheel")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel alone, and sees torch where the tests have it."""
    python = distribution.make_environment(tmp_path_factory.mktemp("environment"))
    distribution.install(python, wheel)
    return python


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    release.check_wheel(wheel)
    files = distribution.wheel_files(wheel)
    (licence,) = [name for name in files if name.endswith("LICENSE")]
    assert files[licence] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_gives_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    out, unpacked, rebuilt = (tmp_path / name for name in ("out", "unpacked", "rebuilt"))
    for folder in (out, unpacked, rebuilt):
        folder.mkdir()
    source = distribution.unpack(distribution.build(tree, out, "sdist"), unpacked)
    assert all((source / name).read_bytes() == (ROOT / name).read_bytes() for name in distribution.FILES)
    assert not (source / "tests").exists()
    release.check_wheel_of_sdist(wheel, distribution.build(source, rebuilt, "wheel"))


def test_a_surplus_file_is_an_error(wheel: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(wheel, tmp_path))
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("surgery/surplus.py", "")
    with pytest.raises(RuntimeError, match=r"surgery/surplus\.py"):
        release.check_wheel(other)
    with pytest.raises(RuntimeError, match=r"surgery/surplus\.py"):
        release.check_wheel_of_sdist(wheel, other)


def test_the_version_has_a_section_in_the_changelog(monkeypatch: pytest.MonkeyPatch) -> None:
    release.check_changelog()
    monkeypatch.setattr(release, "__version__", "0.0.7")
    with pytest.raises(RuntimeError, match=r"\[0\.0\.7\]"):
        release.check_changelog()


def test_it_works_where_nothing_else_is_installed(python: Path, tmp_path: Path) -> None:
    assert "remove work" in run(python, "-I", distribution.SMOKE, folder=tmp_path)


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from surgery import __version__

    (script,) = python.parent.glob("surgery*")
    assert run(script, "--version", folder=tmp_path) == f"surgery {__version__}\n"


def test_the_runner_needs_no_torch(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = """
import sys
sys.modules["torch"] = None
from surgery.onnx import OnnxRunner, convert_peft, read_adapter
assert not {"transformers", "onnx", "networkx"} & set(sys.modules)
"""
    run(python, "-I", "-c", code, folder=tmp_path)


def test_rules_are_found_by_name_without_importing_them(python: Path, tmp_path: Path) -> None:
    code = """
import sys
from importlib.metadata import entry_points
from surgery import rules_from_json
assert "surgery.rules" not in sys.modules
names = [entry.name for entry in entry_points(group="surgery.rules")]
assert sorted(names) == sorted(set(names)), names
(made,) = rules_from_json('[{"rule": "lora", "version": 1, "targets": ["query"], "rank": 4}]')
from surgery import rules
assert made == rules.LoraRule("query", rank=4)
found = {entry.load() for entry in entry_points(group="surgery.rules") if not entry.name.endswith("-slot")}
from surgery.rules import rewrites
assert found == {getattr(part, name) for part in (rules, rewrites) for name in part.__all__ if name.endswith('Rule')}
assert all(entry.load().name == entry.name for entry in entry_points(group="surgery.rules"))
"""
    run(python, "-I", "-c", code, folder=tmp_path)


def test_the_metadata_is_whole(python: Path, tmp_path: Path) -> None:
    code = """
from importlib.metadata import metadata, requires
about = metadata("model-surgery")
assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.11"
needed = {text.split(">")[0] for text in requires("model-surgery") if "extra" not in text}
assert needed == {"torch", "safetensors", "networkx", "transformers", "lazy_loader"}, needed
assert about.get_payload().startswith("# model-surgery")
"""
    run(python, "-I", "-c", code, folder=tmp_path)
