"""`help` and `dir` of the public packages show a page and the public names."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from types import ModuleType

import pytest

import surgery
import surgery.onnx
import surgery.peft
from surgery import rules

PACKAGES = [surgery, rules, surgery.onnx, surgery.peft]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_help_is_a_page_with_every_public_name(package: ModuleType) -> None:
    page = pydoc.plain(pydoc.render_doc(package))
    assert len(page) < 10_000
    absent = set(package.__all__) - set(re.findall(r"\w+", page))
    assert not absent, f"add them to the docstring of {package.__name__}: {absent}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_dir_and_a_star_give_the_public_names_alone(package: ModuleType) -> None:
    assert sorted(dir(package)) == sorted(package.__all__)
    namespace: dict[str, object] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(package.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match=f"{package.__name__}.*absent"):
            package.absent  # noqa: B018


def test_the_packages_are_attributes_that_are_imported_at_their_first_use() -> None:
    code = """
import sys, surgery
assert "torch" not in sys.modules and "surgery.rules" not in sys.modules
assert surgery.rules.LoraRule("0").rank == 8
for name in ("onnx", "peft", "testing", "trainer"):
    assert getattr(surgery, name).__name__ == f"surgery.{name}" and name not in dir(surgery)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
