"""The tables of docs/reference/peft-suite.md: by file, by method, and every test that differs with its reason."""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from tests.reports.peft_suite import classes, run
from tests.support import ROOT

PAGE = ROOT / "docs/reference/peft-suite.md"
MARKS = ("<!-- made by make peft-suite -->\n", "<!-- end of make peft-suite -->")
COLUMNS = ("run", "passed", *classes.KINDS)


def share(counter: Counter[str]) -> str:
    """The part that passes of the tests that are not of (a), (b) or (f)."""
    counted = counter["run"] - counter["a"] - counter["b"] - counter["f"] - counter["skipped"]
    return f"{100 * counter['passed'] / counted:.1f} %" if counted else "–"


def numbers(rows: Iterable[tuple[str, Counter[str]]], first: str) -> list[str]:
    lines = [f"| {first} | run | pass | {' | '.join(classes.KINDS)} | share |", "|---|" + "---:|" * 9]
    lines += [f"| {name} | {' | '.join(str(row[key]) for key in COLUMNS)} | {share(row)} |" for name, row in rows]
    return lines


def escape(text: str) -> str:
    """A text for a cell of a table: what is between backticks stays as it is, except bars."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def short(name: str) -> str:
    """The name of one of PEFT's tests or files as the page has it, so that it does not pass for one of this project."""
    return f"`{name.removeprefix('test_').removesuffix('.py')}`"


def by_method(facade: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Counter[str]]]:
    """The same numbers by the configuration among a test's parameters."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for test, result in facade.items():
        failed = result["outcome"] == "failed"
        row = rows[result.get("method") or "no configuration among the parameters"]
        row["run"] += 1
        row[classes.classify(test, result).kind if failed else result["outcome"]] += 1
    return sorted(rows.items())


def differing(facade: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each reason, with the tests that it costs."""
    lines = ["| kind | reason | tests | which |", "|---|---|---:|---|"]
    for cause in classes.causes(facade):
        functions = Counter(re.sub(r"_\d+$", "", test.rpartition("::")[2].partition("[")[0]) for test in cause.tests)
        names = ", ".join(short(name) + (f" × {n}" if n > 1 else "") for name, n in functions.most_common())
        lines.append(f"| {cause.verdict.kind} | {escape(cause.verdict.reason)} | {len(cause.tests)} | {names} |")
    return lines


def section() -> str:
    base, facade = run.results("base"), run.results("facade")
    facade = {test: result for test, result in facade.items() if base.get(test, {}).get("outcome") == "passed"}
    outcomes = Counter(result["outcome"] for result in base.values())
    files = classes.count(base, facade)
    not_run = ", ".join(f"{short(name)} ({why})" for name, why in run.NOT_RUN.items())
    absent = ", ".join(f"{short(name)} ({what})" for name, what in run.ABSENT.items())
    total = sum(files.values(), Counter[str]())
    every = max((line["every"] for line in run.lines("facade") if "every" in line), default=1)
    paragraphs = [
        f"PEFT {version('peft')}: {outcomes['passed']:,} of its tests pass with PEFT on stand-in models. "
        f"With PEFT {outcomes['failed']:,} fail and {outcomes['skipped']:,} are skipped, for want of a hub, a GPU "
        f"or a package. {total['run']:,} of those that pass are run with the façade. "
        f"{outcomes['absent']:,} tests of configurations that the façade does not have are not run.",
        f"Files that need what a test machine may lack are not run: {not_run}. The files of what the façade does not "
        f"have are not run: {absent}.",
        "Names of PEFT's tests and of their files stand here without `test_`. The share is of the tests that are "
        "not of (a), (b) or (f):",
    ]
    if every > 1:
        paragraphs.insert(
            1,
            "This is a sample: of the tests that have a configuration among their parameters, the first of each "
            f"function and about each {every}th other one, or more.",
        )
    if missing := [short(name) for name in sorted(run.files()) if not files.get(name, Counter())["run"]]:
        paragraphs.insert(1, f"Files that have not run yet with the façade: {', '.join(missing)}.")
    head = "\n\n".join(textwrap.fill(text, 120, break_on_hyphens=False) for text in paragraphs)
    kinds = [f"- ({kind}) {words}" for kind, words in classes.KINDS.items()]
    tables = [
        *numbers([*sorted((short(name), row) for name, row in files.items() if row["run"]), ("all", total)], "file"),
        "",
        *numbers(by_method(facade), "method"),
        "",
        "Every test that differs:",
        "",
        *differing(facade),
    ]
    return "\n".join([head, "", *kinds, "", *tables]) + "\n"


def write() -> None:
    """Put the section between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition(MARKS[0])
    if not mark:
        raise RuntimeError(f"{PAGE} has no mark {MARKS[0]!r}")
    PAGE.write_text(before + mark + section() + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
