"""Build the wheel and the sdist from a copy of the sources, and install a wheel into an empty environment.

`tests/project/test_wheel.py` and `make release` (`tests/reports/release.py`) use these functions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from tests.support import ROOT

SMOKE = ROOT / "tests" / "support" / "smoke.py"
PACKAGE, SOURCES = "surgery", ("surgery", "rules")  # what is installed, and the folders that it is built from
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


def run(*words: str | Path, folder: Path) -> str:
    """Run a command in a folder and return what it prints; a failure is an error that holds all its output."""
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def major(package: str) -> int:
    """A package's major version, 0 where it is absent. Looking for the module itself may meddle with distutils."""
    try:
        return int(metadata.version(package).split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def copy_sources(tree: Path) -> None:
    """Copy what a build reads: a build leaves folders in its tree."""
    for name in SOURCES:  # surgery/rules stays a link to rules/
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)


def build(tree: Path, out: Path, kind: Literal["wheel", "sdist"]) -> Path:
    """Build a distribution of a tree into a folder. Needs the package `build`."""
    # An older setuptools does not read the licence of pyproject.toml: then `build` fetches a newer one.
    isolation = () if major("setuptools") < 77 else ("--no-isolation",)
    run(sys.executable, "-m", "build", f"--{kind}", *isolation, "--outdir", out, tree, folder=out)
    (file,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist into a folder, and return the tree in it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def package_files(tree: Path) -> set[str]:
    """The package files in a source tree, relative to it; follows the link `surgery/rules`."""
    folders = [Path(folder) for folder, *_ in os.walk(tree / PACKAGE, followlinks=True)]
    files = {file for folder in folders for file in folder.iterdir() if file.is_file()}
    return {file.relative_to(tree).as_posix() for file in files if "__pycache__" not in file.parts}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """What a wheel holds: name → content."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_environment(folder: Path) -> Path:
    """Make an empty environment and return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (python,) = [path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists()]
    return python


def install(python: Path, wheel: Path, *, dependencies: bool = False) -> None:
    """Install a wheel into an environment, and either its dependencies or a way to see this environment's packages."""
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "-q")
    folder = python.parent.parent
    if dependencies:
        run(*pip, "-c", ROOT / "constraints.txt", wheel, folder=folder)
        return
    run(*pip, "--no-deps", "--no-index", wheel, folder=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # A path in a .pth file comes last, and .pth files there (an editable install) are not read.
    (packages / "tests_packages.pth").write_text(str(Path(torch.__file__).parent.parent))
