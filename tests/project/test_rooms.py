"""docs/explanation/design.md shows the packages as they are."""

from __future__ import annotations

import re

from tests.reports.rooms import PAGE, PICTURE, arrows, picture
from tests.support import ROOT


def test_the_picture_of_the_packages_is_drawn_from_the_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `python -m tests.reports.rooms`"
    assert f"](../assets/{PICTURE.name})" in PAGE.read_text(encoding="utf-8")


def test_every_package_has_its_line_and_its_door() -> None:
    rows = re.findall(r"^\| `([a-z_]+)/` \|.*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert {name for name, _ in rows} == {name for name in arrows() if (ROOT / "surgery" / name).is_dir()}
    for name, doors in rows:
        for door in re.findall(r"`([^`]+)`", doors):
            assert (ROOT / "surgery" / name / door).is_file(), (name, door)


def test_all_paths_on_the_pages_of_the_design_are_there() -> None:
    for page in (PAGE, PAGE.parent / "exact-inverse.md", *PAGE.parent.glob("internals/*.md")):
        for path in re.findall(r"`([\w/]+/[\w/]*\.py)`", page.read_text(encoding="utf-8")):
            places = [ROOT / path, ROOT / "surgery" / path]
            assert any(place.is_file() for place in places), (page.name, path)
