"""Build the sdist and the wheel of a release, check both, and try each in an empty environment: `make release`.

The files are put into `dist/` when every check has passed.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from surgery import __version__
from tests.support import ROOT, distribution


def check_changelog() -> None:
    """A release has a section in the changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE):
        raise RuntimeError(f"CHANGELOG.md has no section '## [{__version__}] - YYYY-MM-DD'")


def uncommitted() -> str:
    """The changes that git does not have, as it lists them; nothing where the tree is not a repository."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode else done.stdout.rstrip()


def check_wheel(wheel: Path) -> None:
    """A wheel holds the packages' files, its metadata, and nothing else."""
    names = {name for name in distribution.wheel_files(wheel) if ".dist-info/" not in name}
    if difference := names ^ distribution.package_files(ROOT):
        raise RuntimeError(f"{wheel.name} and the packages differ in {sorted(difference)}")


def check_wheel_of_sdist(wheel: Path, other: Path) -> None:
    """The wheel of the sdist is the wheel of the tree, byte for byte."""
    ours, theirs = distribution.wheel_files(wheel), distribution.wheel_files(other)
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if names:
        raise RuntimeError(f"the wheel of the sdist differs from the wheel of the tree in {names}")


def try_wheel(wheel: Path, folder: Path, dependencies: bool) -> str:
    """Install a wheel into a new environment in a folder, and run the smoke program there."""
    folder.mkdir()
    python = distribution.make_environment(folder)
    distribution.install(python, wheel, dependencies=dependencies)
    return distribution.run(python, "-I", distribution.SMOKE, folder=folder).strip()


def release(out: Path, folder: Path, dependencies: bool) -> None:
    """Build and check a release in a folder, and copy its two files to `out`."""
    tree, built, unpacked, rebuilt = (folder / name for name in ("tree", "built", "unpacked", "rebuilt"))
    for path in (tree, built, unpacked, rebuilt):
        path.mkdir()
    distribution.copy_sources(tree)
    sdist, wheel = (distribution.build(tree, built, kind) for kind in ("sdist", "wheel"))
    wheel_of_sdist = distribution.build(distribution.unpack(sdist, unpacked), rebuilt, "wheel")
    print("built:", sdist.name, wheel.name, flush=True)
    check_wheel(wheel)
    check_wheel_of_sdist(wheel, wheel_of_sdist)
    distribution.run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, folder=folder)
    print("checked: contents, metadata, and the wheel of the sdist is the same", flush=True)
    print("wheel:", try_wheel(wheel, folder / "wheel", dependencies), flush=True)
    print("sdist:", try_wheel(wheel_of_sdist, folder / "sdist", dependencies), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for file in (sdist, wheel):
        shutil.copy(file, out)
        data = file.read_bytes()
        print(f"{len(data):>9,} bytes  sha256 {hashlib.sha256(data).hexdigest()}  {out / file.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and check the sdist and the wheel of a release")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of the two files")
    parser.add_argument(
        "--dependencies",
        action="store_true",
        help="install the dependencies, too; by default the environment sees ours",
    )
    arguments = parser.parse_args()
    check_changelog()
    if changes := uncommitted():
        print(f"Warning: the tree has changes that are not committed:\n{changes}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        release(arguments.out.resolve(), Path(folder), arguments.dependencies)


if __name__ == "__main__":
    main()
