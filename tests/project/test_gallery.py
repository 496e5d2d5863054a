"""The pictures of rules: one a rule, shown on its page, as `make gallery` draws them today."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from surgery import Rule, rules

pytest.importorskip("networkx", reason="pictures are laid out with networkx")

from tests.reports.gallery import PICTURES, SHOWN, pictures  # noqa: E402

PAGES = PICTURES.parent / "reference" / "rules"
NAMES = [name for name in rules.__all__ if isinstance(kind := getattr(rules, name), type) and issubclass(kind, Rule)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return pictures()


def test_every_rule_is_shown_and_nothing_else() -> None:
    assert sorted(SHOWN) == sorted(NAMES), "give each rule a line in tests/reports/gallery.py"
    assert sorted(file.stem for file in PICTURES.iterdir()) == sorted(NAMES), "run make gallery"


@pytest.mark.parametrize("name", NAMES)
def test_a_rules_picture(name: str, drawn: dict[str, str]) -> None:
    page = (PAGES / f"{getattr(rules, name).name}.md").read_text(encoding="utf-8")
    assert f"](../../pictures/{name}.svg)" in page
    stored = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert stored == drawn[name] + "\n", "run make gallery"
    words = {element.text for element in ElementTree.fromstring(stored).iter() if element.tag.endswith("text")}
    assert len(words) > 2 and "#ffe0b3" in stored  # the colour of what was inserted
