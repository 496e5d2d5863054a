"""The site of the pages builds without a warning, and shows its pages without another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("material", reason="mkdocs-material builds the site: make docs installs it")
pytest.importorskip("mkdocstrings", reason="mkdocstrings writes the API's pages: make docs installs it")

LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


class Loads(HTMLParser):
    """What a page loads when it is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADED.get(tag, ""))
        if address:
            self.addresses.append(address)


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        outside = [address for address in Loads(page.read_text(encoding="utf-8")).addresses if is_outside(address)]
        assert not outside, f"{page.relative_to(site)} loads {outside}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        outside = [address for address in re.findall(r"url\([\"']?([^)\"']+)", text) if is_outside(address)]
        assert not outside, f"{style.relative_to(site)} loads {outside}"


def is_outside(address: str) -> bool:
    return bool(re.match(r"(https?:)?//", address))


def test_search_has_its_index_in_a_file(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "LoraRule" in index
    assert "assets/iframe-worker.js" in (site / "404.html").read_text(encoding="utf-8")


def test_every_name_of_the_api_is_on_its_page(site: Path) -> None:
    for source in (ROOT / "docs" / "reference" / "api").glob("*.md"):
        names = re.findall(r"^::: ([\w.]+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
        page = (site / "reference" / "api" / f"{source.stem}.html").read_text(encoding="utf-8")
        assert not [name for name in names if f'id="{name}"' not in page], source.name


def test_the_menu_of_the_how_to_pages_has_the_sections_of_their_index(site: Path) -> None:
    index = (ROOT / "docs" / "how-to" / "index.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", index, re.MULTILINE)
    menu = (site / "how-to" / "undo.html").read_text(encoding="utf-8").partition("md-sidebar--primary")[2]
    menu = menu.partition("md-sidebar--secondary")[0]
    places = [menu.find(heading) for heading in headings]
    assert -1 not in places and places == sorted(places)
    # The page's own section is open; others are a link to their first page.
    assert 'href="save-and-load.html"' in menu and 'href="merge.html"' in menu
    assert 'href="choose-what-trains.html"' in menu and 'href="use-torch-compile.html"' not in menu


def test_inline_code_breaks_at_names_and_not_in_options_or_blocks(site: Path) -> None:
    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert '<code><span class="option">--any-base</span></code>' in page
    assert "<wbr>" in (site / "explanation" / "peers.html").read_text(encoding="utf-8")
    for path in site.rglob("*.html"):
        for block in re.findall(r"<pre\b.*?</pre>", path.read_text(encoding="utf-8"), re.DOTALL):
            assert "<wbr>" not in block and 'class="option"' not in block, path
