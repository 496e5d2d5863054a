"""Reads the job and writes the results: shared by the programs. It needs the standard library alone.

    python <program>.py job.json results.jsonl

The job: `base` (folder or file), `settings`, `prompts` (lists of token ids), `new_tokens`, and `cases`. A case has a
`name`, `adapters` (name → folder or file) and `steps`, each {"active": [names]} or {"rows": [a name or null for each
prompt]}. One line is written for each case: {"case", "steps": [answers]} or {"case", "error"}. An answer has any of
`tokens` (for each prompt, the greedy continuation) and `values` (for each prompt, numbers to compare: for a decoder the
log-probabilities of the token after the prompt).
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Case = dict[str, Any]
Answer = dict[str, Any]


def run(open_base: Callable[[dict[str, Any]], Callable[[Case], list[Answer]]]) -> None:
    """Open the base once; then answer case by case. A line is written as soon as its case is done."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with open(sys.argv[2], "a", encoding="utf-8") as results:
        answer = open_base(job)
        for case in job["cases"]:
            line: dict[str, Any] = {"case": case["name"]}
            try:
                line["steps"] = answer(case)
            except Exception as error:  # a program's refusal of one adapter is a result
                traceback.print_exc()
                line["error"] = f"{type(error).__name__}: {error}"
            results.write(json.dumps(line) + "\n")
            results.flush()


def log_softmax(logits: Iterable[float]) -> list[float]:
    numbers = [float(number) for number in logits]
    top = max(numbers)
    total = top + math.log(sum(math.exp(number - top) for number in numbers))
    return [number - total for number in numbers]
