"""`make structure`: structural rules on models of many families, into docs/reference/structure-models.md.

Names of families and of operations as arguments run only these, and keep the other cells of the page.
`--results FILE` appends each cell to a file of JSON lines. A later run with the same file skips the cells that it has.
`--all` also runs the families that are not on the page, and prints their cells.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.support import ROOT
from tests.support.families import FAMILIES as EVERY_FAMILY
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
    *("detr", "whisper", "wav2vec2", "hubert", "wavlm", "clip", "llava", "paligemma", "blip"),
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


def run(name: str, operation: str) -> str:
    """The cell of a family and an operation."""
    try:
        return cell(outcomes(name, operation))
    except Exception as error:
        return f"✗ {_text(f'{type(error).__name__}: {error}'.splitlines()[0])}"


def stored_results(file: Path | None) -> dict[tuple[str, str], str]:
    """The cells of a file of JSON lines. A last line that is cut off is left out."""
    if file is None or not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {(entry["family"], entry["operation"]): entry["cell"] for entry in entries}


def append_result(file: Path, name: str, operation: str, text: str) -> None:
    """Write a cell as a line of its own, also behind a line that is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.read_text(encoding="utf-8") if file.exists() else ""
    if whole and not whole.endswith("\n"):
        file.write_text(whole[: whole.rfind("\n") + 1], encoding="utf-8")
    with file.open("a", encoding="utf-8") as stream:
        entry = {"family": name, "operation": operation, "cell": text}
        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Structural rules on models of many families.")
    parser.add_argument("names", nargs="*", choices=[*FAMILIES, *OPERATIONS, []], metavar="family or operation")
    parser.add_argument("--all", action="store_true", help="also the families that are not on the page")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines, from which a later run goes on")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    old, _, after = rest.partition(MARKS[1])
    rows = {name: cells for name, cells in stored_rows(old).items() if name in FAMILIES}
    operations = [name for name in OPERATIONS if name in options.names] or [*OPERATIONS]
    results = stored_results(options.results)
    others = [name for name in EVERY_FAMILY if name not in FAMILIES] if options.all else []
    for name in [name for name in FAMILIES if name in options.names] or [*FAMILIES, *others]:
        cells = rows.setdefault(name, [""] * len(OPERATIONS))
        for operation in operations:
            text = results.get((name, operation))
            if text is None:
                text = run(name, operation)
                if options.results is not None:
                    append_result(options.results, name, operation, text)
            cells[list(OPERATIONS).index(operation)] = text
        print(name, cells, flush=True)
    ordered = {name: rows[name] for name in FAMILIES if name in rows}
    PAGE.write_text(before + MARKS[0] + table(ordered) + MARKS[1] + after, encoding="utf-8")
    cells = [text for texts in ordered.values() for text in texts]
    refused, wrong = (sum(sign in text for text in cells) for sign in ("refused: ", "✗"))
    print(f"{len(ordered)} families, {len(cells)} cells, {refused} refused, {wrong} that do not hold")
    assert len(CHECKS) == 5, "the page explains five signs"


if __name__ == "__main__":
    main()
