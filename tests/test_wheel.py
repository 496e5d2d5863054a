"""The wheel that is built from this tree holds what it should, and works in an environment that has nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*words: str | Path, folder: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def major(package: str) -> int:
    """A package's major version, 0 where it is absent. Looking for the module itself may meddle with distutils."""
    try:
        return int(metadata.version(package).split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("surgery", "rules"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # What pyproject.toml asks for; an older one does not read its licence.
    if major("setuptools") >= 77 and major("pip"):
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps")
        run(*pip, "--no-build-isolation", "-w", out, ".", folder=tree)
    elif major("build"):  # fetches setuptools
        run(sys.executable, "-m", "build", "--wheel", "--outdir", out, ".", folder=tree)
    else:
        pytest.skip("needs setuptools 77 or build: pip install -e '.[dev]'")
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment that holds the wheel alone, and sees torch where the tests have it."""
    if not major("pip"):
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (found,) = [path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists()]
    pip = (sys.executable, "-m", "pip", "--python", found, "--disable-pip-version-check", "install", "-q")
    run(*pip, "--no-deps", "--no-index", wheel, folder=folder)
    packages = Path(run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # A path in a .pth file comes last, and .pth files there (an editable install) are not read.
    (packages / "tests_packages.pth").write_text(str(Path(torch.__file__).parent.parent))
    yield found


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"surgery", "rules"}
    expected = {
        str(file.relative_to(ROOT))
        for package in ("surgery", "surgery/onnx", "surgery/peft", "rules", "rules/peft")
        for file in ROOT.glob(f"{package}/*.py*")
    }
    assert expected <= set(names) and {"surgery/py.typed", "rules/py.typed"} <= set(names)
    (licence,) = [name for name in names if name.endswith("LICENSE")]
    assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


def test_it_works_where_nothing_else_is_installed(python: Path, tmp_path: Path) -> None:
    code = """
import copy, sys, torch
from torch import nn
import rules, surgery
assert "transformers" not in sys.modules
assert all(module.__file__.startswith(sys.prefix) for module in (rules, surgery)), surgery.__file__
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
chosen = [rules.LoraRule("re:0", rank=2, init="random"), rules.TrainRule("re:2")]
live = surgery.apply_rules(model, chosen, example_inputs=x)(x)
surgery.merge(model)
torch.testing.assert_close(model(x), live)
surgery.remove(surgery.unmerge(model))
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
"""
    run(python, "-I", "-c", code, folder=tmp_path)


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
assert "rules" not in sys.modules
names = [entry.name for entry in entry_points(group="surgery.rules")]
assert sorted(names) == sorted(set(names)), names
(made,) = rules_from_json('[{"rule": "lora", "version": 1, "targets": ["query"], "rank": 4}]')
import rules
assert made == rules.LoraRule("query", rank=4)
found = {entry.load() for entry in entry_points(group="surgery.rules") if not entry.name.endswith("-slot")}
assert found == {getattr(rules, name) for name in rules.__all__ if name.endswith('Rule')}
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
