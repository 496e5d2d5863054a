"""Hooks of `mkdocs.yml`: the order of pages, and pages for files outside docs/ that pages link to.

A folder's pages stand in the order in which its `index.md` links to them; pages without a link follow by name. The
second-level headings of `docs/how-to/index.md` are the sections of its menu.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
SECTIONED = ("how-to/",)  # folders with more pages than a menu shows at once
BLOCK = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL)
INLINE_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
BREAK, OPTION = re.compile(r"[_./](?=\w)"), re.compile(r"(?<![\w-])--?[a-z][\w-]*")
FOLDERS = {
    "start": "Start",
    "tutorials": "Tutorials",
    "how-to": "How-to",
    "reference": "Reference",
    "explanation": "Explanation",
    "project": "Project",
    "api": "API",
    "rules": "Rules",
    "writing-rules": "Writing rules",
    "internals": "Internals",
}


def target_of(source: str, link: str) -> str:
    """The path from the project's root that a link on a page leads to; pages and files are named from there, too."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def outside(files: Files) -> dict[str, str]:
    """Files outside docs/ that pages link to, by the page of the site that shows each."""
    shown: dict[str, str] = {}
    waiting = {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    while waiting:
        source, text = waiting.popitem()
        for match in LINK.finditer(text):
            path = target_of(source, match[2])
            if "://" in match[2] or path.startswith(("docs/", "..")) or path in shown or not (ROOT / path).is_file():
                continue
            shown[path] = f"project/{path}" if path.endswith(".md") else f"project/{path}.md"
            if path.endswith(".md"):
                waiting[path] = (ROOT / path).read_text(encoding="utf-8")
    return shown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    shown = outside(files)
    config.extra["outside"] = shown
    for path, page in shown.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            text = f"# {path}\n\n```{path.rpartition('.')[2]}\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    config.nav = branch([page.src_uri for page in files.documentation_pages()], "", files)
    return files


def branch(pages: list[str], folder: str, files: Files) -> list[Any]:
    """The entries of a folder: its own pages and folders, in order."""
    inside = [page for page in pages if page.startswith(folder)]
    names = {page[len(folder) :].partition("/")[0] for page in inside}
    index = files.get_file_from_path(f"{folder}index.md")
    links = [match[2] for match in LINK.finditer(index.content_string)] if index else []
    firsts = ["index.md"] + (list(FOLDERS) if not folder else [link.partition("/")[0] for link in links])
    order = {name: place for place, name in reversed(list(enumerate(firsts)))}
    entries: list[Any] = []
    for name in sorted(names, key=lambda name: (order.get(name, len(order) + len(firsts)), name)):
        if name.endswith(".md"):
            entries.append({"Home": name} if folder + name == "index.md" else folder + name)
        else:
            entries.append({FOLDERS.get(name, name): branch(inside, f"{folder}{name}/", files)})
    return sections(entries, folder, index.content_string) if index and folder in SECTIONED else entries


def sections(pages: list[str], folder: str, index: str) -> list[Any]:
    """The pages of a folder under the headings of its index that link to them first; others stand before them."""
    _, *parts = HEADING.split(index)
    headings: dict[str, str] = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        for match in LINK.finditer(text):
            headings.setdefault(folder + match[2], heading)
    loose = [page for page in pages if page not in headings]
    return loose + [
        {heading: [page for page in pages if headings.get(page) == heading]} for heading in dict.fromkeys(parts[::2])
    ]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside docs/ lead to their pages, and links of such pages into docs/ to the site's."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    shown: dict[str, str] = config.extra["outside"]
    here = page.file.src_uri
    source = next((path for path, name in shown.items() if name == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        path = target_of(source, match[2])
        place = shown.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if "://" in match[2] or place is None:
            return match[0]
        return match[1] + os.path.relpath(place, posixpath.dirname(here) or ".") + (match[3] or "") + match[4]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Inline code: long names may break after an underscore, a dot or a slash, so that no column takes all the width.

    Options do not break at their hyphens.
    """

    def wrapped(match: re.Match[str]) -> str:
        text = BREAK.sub(r"\g<0><wbr>", match[0]) if len(match[0]) >= 25 else match[0]
        return OPTION.sub(r'<span class="option">\g<0></span>', text)

    parts = BLOCK.split(html)
    parts[::2] = [INLINE_CODE.sub(wrapped, part) for part in parts[::2]]
    return "".join(parts)
