"""The pages of the documentation, and the code on them."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

__all__ = ["TEXT", "blocks", "runs"]


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


@dataclass(frozen=True)
class Block:
    """A fenced block: the word after its fence, the page's line number of its first line, and its text."""

    kind: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    fenced_blocks: list[Block] = []
    fence, start, body = "", 0, list[str]()
    for number, line in enumerate(page.splitlines(), 1):
        if not fence and line.startswith("```"):
            fence, start, body = line[3:].strip() or "text", number + 1, []
        elif fence and line.startswith("```"):
            fenced_blocks.append(Block(fence, start, "\n".join(body) + "\n"))
            fence = ""
        else:
            body.append(line)
    return fenced_blocks


def runs(name: str, folder: Path) -> Iterator[tuple[Block, str, Block | None]]:
    """Run a page's code: each block, what it printed, and the block that shows what it should print."""
    page = TEXT[name]
    fenced_blocks = blocks(page)
    # The code is put on the page's own lines of a real file: tracebacks name them, and sources can be read.
    lines = [""] * (len(page.splitlines()) + 1)
    for block in fenced_blocks:
        if block.kind == "python":
            lines[block.line - 1 : block.line - 1 + block.text.count("\n")] = block.text.splitlines()
    file = folder / (re.sub(r"\W", "_", name) + ".py")
    file.write_text("\n".join(lines), encoding="utf-8")
    module = types.ModuleType(file.stem)
    sys.modules[module.__name__] = module
    try:
        for block, after in zip(fenced_blocks, [*fenced_blocks[1:], None], strict=True):
            if block.kind != "python":
                continue
            code = compile("\n" * (block.line - 1) + block.text, str(file), "exec", dont_inherit=True)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, module.__dict__)
            end = block.line + block.text.count("\n")
            shown = after if after is not None and after.kind == "text" and after.line == end + 3 else None
            yield block, printed.getvalue(), shown
    finally:
        del sys.modules[module.__name__]
