"""The pictures of rules: one a rule, shown on its page, as `make gallery` draws them today."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from surgery import Drawing, Rule, StructureRule, rules

pytest.importorskip("pygraphviz", reason="pictures are laid out with graphviz")

from tests.reports.gallery import PICTURES, SHOWN, page_pictures, pictures  # noqa: E402

PAGES = PICTURES.parent / "reference" / "rules"
RULES = [name for name in rules.__all__ if isinstance(kind := getattr(rules, name), type) and issubclass(kind, Rule)]
NAMES = [name for name in RULES if not issubclass(getattr(rules, name), StructureRule)]  # those that edit forwards


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same_picture(stored: str, drawn: str) -> bool:
    """Whether two pictures have the same elements, and numbers less than a pixel apart (processors round)."""
    if NUMBER.sub("0", stored) != NUMBER.sub("0", drawn):
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(drawn), strict=True)
    return all(abs(float(first) - float(second)) < 1 for first, second in pairs)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawing]:
    return pictures()


def test_every_rule_is_shown_and_nothing_else() -> None:
    assert sorted(SHOWN) == sorted(NAMES), "give each rule a line in tests/reports/gallery.py"
    files = {file.stem for file in PICTURES.iterdir()}
    assert {name for name in files if not name.startswith("page-")} == set(NAMES), "run make gallery"


def test_the_pictures_of_the_page() -> None:
    drawings = page_pictures()
    assert {file.stem for file in PICTURES.glob("page-*.svg")} == set(drawings)
    page = (PICTURES.parent / "how-to" / "pictures.md").read_text(encoding="utf-8")
    for name, drawing in drawings.items():
        assert f"](../pictures/{name}.svg)" in page
        assert same_picture((PICTURES / f"{name}.svg").read_text(encoding="utf-8"), drawing + "\n"), "run make gallery"


@pytest.mark.parametrize("name", NAMES)
def test_a_rules_picture(name: str, drawn: dict[str, Drawing]) -> None:
    page = (PAGES / f"{getattr(rules, name).name}.md").read_text(encoding="utf-8")
    assert f"](../../pictures/{name}.svg)" in page
    stored = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert same_picture(stored, drawn[name] + "\n"), "run make gallery"
    words = {element.text for element in ElementTree.fromstring(stored).iter() if element.tag.endswith("text")}
    assert len(words) > 2 and "sg-own sg-c0" in stored  # what was inserted


def test_the_tables_of_support_are_what_the_rules_do() -> None:
    pytest.importorskip("torchao", reason="a quantised Linear is torchao's")
    from tests.reports.rule_support import pages

    stale = [page.name for page, text in pages() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run make gallery"
