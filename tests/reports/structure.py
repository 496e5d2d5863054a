"""`make structure`: structural rules on models of many families, into docs/reference/structure-models.md.

Names of families and of operations as arguments run only these, and keep the other cells of the page.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Mapping

import torch

from tests.support import ROOT
from tests.support.structure_checks import CHECKS, OPERATIONS, outcomes

PAGE = ROOT / "docs/reference/structure-models.md"
MARKS = ("<!-- made by make structure -->\n", "<!-- end of make structure -->\n")

FAMILIES = [
    *("bert", "roberta", "distilbert", "electra", "deberta_v2", "mpnet", "modernbert", "xlnet", "xlm", "longformer"),
    *("funnel", "roformer", "gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "llama", "mistral"),
    *("qwen2", "qwen3"),
    *("gemma2", "gemma3", "phi3", "falcon", "mpt", "cohere2", "olmo3", "smollm3", "lfm2", "t5", "umt5", "bart"),
    *("pegasus", "marian", "m2m_100", "prophetnet", "mixtral", "qwen2_moe", "deepseek_v3", "ernie4_5_moe", "nllb_moe"),
    *("mamba", "mamba2", "bamba", "rwkv", "recurrent_gemma", "vit", "beit", "dinov2", "swin", "convnext", "sam_vision"),
    *("detr", "whisper", "wav2vec2", "hubert", "wavlm", "clip", "llava", "paligemma"),
]


def cell(result: Mapping[str, str | None] | str) -> str:
    """One sign a check, with the reasons of those that do not hold; or why the rule is refused."""
    if isinstance(result, str):
        return result if result == "–" else f"refused: {_text(result)}"
    signs = "".join("✓" if why is None else "–" if why == "–" else "✗" for why in result.values())
    reasons = [f"{check}: {_text(why)}" for check, why in result.items() if why not in (None, "–")]
    return " ".join([signs, *reasons])


def _text(why: str | None) -> str:
    return re.sub(r"\s+", " ", why or "").replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


def table(rows: Mapping[str, list[str]]) -> str:
    """The table, and below it the reasons, by number."""
    notes: dict[str, int] = {}
    lines = [f"| family | {' | '.join(OPERATIONS)} |", "|---" * (len(OPERATIONS) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {_text(name)} | {' | '.join(_short(text, notes) for text in cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]) + "\n"


def _short(text: str, notes: dict[str, int]) -> str:
    """A cell without its reason, which gets a number."""
    head, _, note = text.partition(" ")
    return f"{head.rstrip(':')} ({notes.setdefault(note, len(notes) + 1)})" if note else head


def stored_rows(text: str) -> dict[str, list[str]]:
    """The rows of the page, by family, with their reasons."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = {}
    for line in [line for line in text.splitlines()[2:] if line.startswith("|")]:
        name, *cells = [part.strip() for part in re.split(r"(?<!\\)\|", line.strip("|"))]
        cells = [re.sub(r" \((\d+)\)$", lambda match: f" {notes[match[1]]}", cell) for cell in cells]
        cells = [cell.replace("refused ", "refused: ", 1) if "refused: " not in cell else cell for cell in cells]
        rows[name.replace("\\_", "_")] = [*cells, *[""] * (len(OPERATIONS) - len(cells))]
    return rows


def main(names: list[str]) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    old, _, after = rest.partition(MARKS[1])
    rows = {name: cells for name, cells in stored_rows(old).items() if name in FAMILIES}
    operations = [name for name in names if name in OPERATIONS] or [*OPERATIONS]
    for name in [name for name in names if name in FAMILIES] or FAMILIES:
        cells = rows.setdefault(name, [""] * len(OPERATIONS))
        for operation in operations:
            try:
                text = cell(outcomes(name, operation))
            except Exception as error:
                text = f"✗ {_text(f'{type(error).__name__}: {error}'.splitlines()[0])}"
            cells[list(OPERATIONS).index(operation)] = text
        print(name, cells, flush=True)
    ordered = {name: rows[name] for name in FAMILIES if name in rows}
    PAGE.write_text(before + MARKS[0] + table(ordered) + MARKS[1] + after, encoding="utf-8")
    cells = [text for texts in ordered.values() for text in texts]
    refused, wrong = (sum(sign in text for text in cells) for sign in ("refused: ", "✗"))
    print(f"{len(ordered)} families, {len(cells)} cells, {refused} refused, {wrong} that do not hold")
    assert len(CHECKS) == 5, "the page explains five signs"


if __name__ == "__main__":
    main(sys.argv[1:])
