"""The table on screen and docs/explanation/benchmarks.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from surgery.results import table
from tests.benchmarks.lines import Row
from tests.benchmarks.timing import Setting
from tests.support import ROOT

PAGE = ROOT / "docs" / "explanation" / "benchmarks.md"

INTRO = """# Benchmarks

`make bench` measures, prints this table and writes this page. `make bench DEVICE=cuda` adds the table of a GPU. With
`ARGS="--only train"` it measures one line and writes nothing.

## How it is measured

A figure is a ratio to one of three: to the same model without adapters and with frozen parameters ("base"), to PEFT
doing the same work, or to `import torch`. The column PEFT has PEFT's own ratio to the same.

- The candidates run in turn, round by round, in one process. A figure is the median over the rounds of the ratio within
  a round.
- On the CPU one thread works. CPU time is counted and not the clock's, so other programs on the machine do not count.
- Adapters have rank 8, are on all linear layers, and are moved from zero.
- A training step is forward and backward of 4 × 128 tokens, with gradients down to the embeddings.
- The models have random weights: a Llama of 4 layers, 1,024 wide; a Llama of 6 layers, 576 wide (SmolLM2-135M's shape);
  a BERT of 6 layers, 384 wide (MiniLM's shape), without its own dropout.
- A compiled training step is compiled by inductor, on a Llama of 3 layers, 512 wide. The base is compiled, too.
- Prefixes are 20 long, on a Llama of 12 layers, 512 wide. PEFT's is its prefix tuning. Decoding is compared with a base
  whose cache has as many positions as cache and prefix together, as PEFT's has. Here the cache holds the text alone.
- A decoding step in float32 on a long cache (2¹⁸ entries of keys, a megabyte) computes scores against prefix and text
  side by side and adds the two sums of values, so no key or value is copied. A step on a shorter cache puts the prefix
  before a copy of it, which takes less time than many small operations.
- Growth is the exponent of a verb's CPU time in the number of layers of seven Linears, or of idle adapters. It is the
  slope of a line through the logarithms by least squares, with the lesser time of two calls at each size.
- Merges into files are compared with twenty lines that read, change and write one file after the other. Imports do not
  count. Private memory is the peak above that before the merge, in a process for each way.
- Copies and pickles, whose work is Python's and torch's, are measured relative to those of the model without adapters.
"""

PREFIX = (
    "attention gets tensors of the same shapes, strides and masks as PEFT's, and the operations are as many to within"
    " a few: making the mask in every layer, 25 µs, is 0.2 % of the forward. PEFT beside itself differs by up to 1.5 "
    "% in one process, and other runs gave 1.01 and 1.03 forward, 0.98 and 0.99 for training: at the limit of what is"
    " measured here, and not below PEFT."
)

WHY = {
    "forward": "384 wide, rank 8 is 4 % of a layer's arithmetic, and matrices eight wide run at half the speed of the "
    "layer's own; what Python does for each layer is another 2 %. Wider models come closer to the base.",
    "decode": "a layer's product for one token takes tens of microseconds here, and the two small products beside it "
    "cost about ten whatever the layer's size. Wider models come closer to the base.",
    "training step, dropout 0:": "384 wide, rank 8 is 4 % of a layer's arithmetic, and matrices eight wide run at half "
    "the speed of the layer's own. Wider models come closer to the base.",
    "training step, dropout 0.1:": "in a narrow model torch's own draw of the mask is a large part: for one 384-wide "
    "layer it takes 0.7 of the time of the layer's product, for PEFT, too. Masks from random bytes would take a fifth "
    "of it, and would not be those that the same seed gives to `F.dropout`, which these are.",
    "adapter #": "what remains is making two tensors and their records at each site, 60 microseconds.",
    "remove adapter #": "PEFT takes entries from dictionaries; here every site is checked and gets another class, 15 "
    "microseconds.",
    "remove one": "what is looked at does not grow, but the processor's caches hold less of it.",
    "switch to": "two thirds of it is setting `requires_grad` of both adapters' tensors, which lie apart in memory.",
    "merge + unmerge": "a copy is new memory, and for large weights half of the time goes by until the system has "
    "handed out its pages, where PEFT reuses its own; a checksum that tells a changed weight before it is lost takes "
    "another fifth. PEFT's pair does neither, and does not give the weights back.",
    "merge into 8 files": "the plan takes about a millisecond for each Linear, whatever its size, so its share is less "
    "in larger checkpoints; and the product is one in float64, whose bits `unmerge_files` finds again, and which takes "
    "twice the time of the loop's.",
    "merged forward": "noise: a merged module is of the base's own class and runs the base's own code "
    "(`test_apply_merge_unmerge_remove`).",
    "prefix of 20, forward": PREFIX,
    "prefix of 20, training": PREFIX,
    "import": "importing the engine's own modules.",
    "onnxruntime, 64 tokens, merged": "noise: the graph is the base's own, operation for operation "
    "(`test_merged_is_the_bases_own_graph`).",
    "onnxruntime, 64 tokens, slots, rank 8": "three operations a layer stand beside two; 384 wide, 4 % of "
    "the arithmetic, and matrices eight wide run at half the speed of the layer's own. Wider models come closer.",
    "onnxruntime, milliseconds to load": "each tensor is looked at, some microseconds: its type, its shape, and a "
    "checksum; what onnxruntime itself does to read the file is a fourth of it, and the checksum a third.",
    "growth with": "the lines of Python that run are counted (`test_growth.py`): exactly linear in layers, constant in "
    "idle adapters. The rest is memory: 512 layers, or 300 adapters, are many times the processor's caches, and the "
    "garbage collector goes through all of it before each measured call. With the model frozen for the collector "
    "(`gc.freeze`), all verbs but `deactivate` (0.21 ms beside one, 0.46 ms beside 300) grow by at most 0.1 with idle "
    "adapters. Single exponents differ by up to 0.1 between two runs.",
    "exporting with slots": "the branches are one operation a layer while it is traced, and products at the end.",
}


def machine(setting: Setting) -> str:
    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in names)
    where = torch.cuda.get_device_name() if setting.cuda else "CPU, one thread"
    return f"{where}; Python {platform.python_version()}, {versions}; medians of {setting.rounds} interleaved runs."


def line(row: Row) -> str:
    return f"  {row.work}: {_number(row.figure)}" + (f"  (PEFT {row.peft:.2f})" if row.peft else "")


def shown(rows: Sequence[Row], setting: Setting) -> str:
    return table(_head(setting), [_cells(row, setting) for row in rows])


def write(rows: Sequence[Row], setting: Setting) -> Path:
    """Put this device's section into the page, beside those of other devices."""
    heading = "GPU" if setting.cuda else "CPU"
    sections = dict(part.split("\n", 1) for part in _read().split("\n## ")[1:])
    sections = {name: text for name, text in sections.items() if name in ("CPU", "GPU")}
    sections[heading] = _section(rows, setting)
    parts = [INTRO, *(f"## {name}\n{text.rstrip()}\n" for name, text in sorted(sections.items()))]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    return PAGE


def _read() -> str:
    return PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""


def _section(rows: Sequence[Row], setting: Setting) -> str:
    head = _head(setting)
    lines = ["", machine(setting), "", _markdown(head), _markdown(["---"] + ["--:"] * (len(head) - 1))]
    lines += [_markdown(_cells(row, setting)) for row in rows]
    missed: dict[str, list[str]] = {}
    for row in rows:
        if not row.met:
            why = next((text for start, text in WHY.items() if row.work.startswith(start)), "not yet looked into.")
            missed.setdefault(why, []).append(f"{row.work}: {_number(row.figure)} for {_aim(row)}")
    if missed:
        lines += ["", "Aims that are missed, and why:", ""]
        lines += [f"- {'; '.join(works)}: {why}" for why, works in missed.items()]
    return "\n".join(lines)


def _head(setting: Setting) -> list[str]:
    return ["work", "aim", "surgery", "PEFT", "met", *(["ms"] if setting.cuda else [])]


def _cells(row: Row, setting: Setting) -> list[str]:
    peft = "–" if row.peft is None else f"{row.peft:.2f}"
    cells = [row.work, _aim(row), _number(row.figure), peft, "yes" if row.met else "no"]
    if setting.cuda:
        cells.append("–" if row.seconds is None else f"{1000 * row.seconds:.3f}")
    return cells


def _aim(row: Row) -> str:
    return f"≤ {row.aim:g}" + (f" × {row.to}" if row.to else "") + (" and below PEFT" if row.below_peft else "")


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
