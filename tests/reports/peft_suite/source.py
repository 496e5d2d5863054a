"""Copies of PEFT's tests: one imports PEFT, the other the façade in its place."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from pathlib import Path

from tests.reports.peft_suite import OUT, PACKAGE, SHIM, SIDES

# In both copies: the package's new name, and no model is looked for on the network, even the first time.
# In the façade's: imports of PEFT, and paths that tests patch.
RENAMES = (
    (re.compile(r"^(\s*from )tests\.", re.MULTILINE), rf"\1{PACKAGE}."),
    (re.compile(r"^(\s*is_offline = ).*", re.MULTILINE), r"\1True"),
)
REDIRECTS = (
    (re.compile(r"^(\s*from )peft(?=[. ])", re.MULTILINE), rf"\1{SHIM}"),
    (re.compile(r"^(\s*import )peft(?=\.)", re.MULTILINE), rf"\1{SHIM}"),
    (re.compile(r"^(\s*import )peft$", re.MULTILINE), rf"\1{SHIM} as peft"),
    (re.compile(r"((?:patch|setattr)\(\s*[\"'])peft\."), rf"\1{SHIM}."),
)


def check(source: Path) -> None:
    """The folder holds PEFT's source with its tests, of the version that is installed."""
    tests, start = source / "tests", source / "src/peft/__init__.py"
    if not (tests.is_dir() and start.is_file()):
        raise SystemExit(
            f"PEFT_SOURCE={source}: there are no tests/ and src/peft/ in it. Name a folder with PEFT's source of "
            f"version {version('peft')}: its source distribution, unpacked, or a checkout of its repository."
        )
    found = re.search(r'^__version__ = "(.+)"', start.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or found[1] != version("peft"):
        raise SystemExit(
            f"PEFT_SOURCE={source}: it is PEFT {found and found[1]}, and PEFT {version('peft')} is installed. "
            "Both must be the same version."
        )


def copy(source: Path) -> None:
    """Write both copies, out/peft-suite/base and out/peft-suite/facade."""
    for side in SIDES:
        folder = OUT / side / PACKAGE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder.parent / "pytest.ini").write_text("[pytest]\nmarkers =\n    regression\n", encoding="utf-8")
        for path in sorted((source / "tests").glob("*.py")):
            text = path.read_text(encoding="utf-8")
            for pattern, new in (*RENAMES, *(REDIRECTS if side == "facade" else ())):
                text = pattern.sub(new, text)
            (folder / path.name).write_text(text, encoding="utf-8")
