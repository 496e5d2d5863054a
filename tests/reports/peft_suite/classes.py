"""Puts each test that fails with the façade into a class, with a reason: see `reasons.py` for the rules."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.reports.peft_suite import OUT, PACKAGE
from tests.reports.peft_suite.reasons import INTERNAL_ATTRIBUTE, INTERNAL_LINE, REASONS
from tests.reports.peft_suite.run import file_of

KINDS = {
    "a": "a name that the façade does not have, by design",
    "b": "PEFT's own internals: its layers, their names and attributes, its private functions",
    "c": "refused, with the field",
    "d": "differs",
    "e": "the words or the type of an error or a warning",
    "f": "PEFT refuses what works here",
}


@dataclass(frozen=True)
class Verdict:
    kind: str
    reason: str


@dataclass
class Cause:
    """The tests that fail for one reason."""

    verdict: Verdict
    tests: list[str] = field(default_factory=list)
    lines: Counter[str] = field(default_factory=Counter)


@cache
def _expectations(name: str) -> list[tuple[int, int, str]]:
    """The `with pytest.raises(…)` and `pytest.warns(…)` of a file of tests: first line, last line, source."""
    tree = ast.parse((OUT / "facade" / PACKAGE / name).read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    sources = [(node, " ".join(ast.unparse(item.context_expr) for item in node.items)) for node in blocks]
    return [(n.lineno, n.end_lineno or 0, source) for n, source in sources if re.search(r"\b(raises|warns)\(", source)]


def expectation(result: Mapping[str, Any]) -> str:
    """What a test expected to be raised or warned of where it failed; "" if nothing."""
    for name, number, *_ in reversed(result.get("tests", [])):
        for first, last, source in _expectations(name):
            if first <= number <= last:
                return source
    return ""


def normalized(text: str) -> str:
    """A text without what differs from test to test."""
    text = re.sub(r"\n  where: [^\n]*", "", text)  # a refusal names the site
    text = re.sub(r"tensor\(.*", "tensor(…", text, flags=re.DOTALL)
    text = re.sub(r"\b[A-Z]\w*Config\b(\(.*)?", "…Config", text, flags=re.DOTALL)
    text = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "#", text)
    return re.sub(r"\s+", " ", text).strip()


def _expected(source: str, text: str) -> str:
    """What a test expects to be said: its regular expression in plain words, or the source that names it."""
    patterns = (r"Expected regex: (['\"])(.*?)\1\s", r"match=[rf]?(['\"])(.*?)\1")
    found = [match for match in (re.search(patterns[0], text), re.search(patterns[1], source)) if match]
    return normalized(found[0][2].replace("\\", ""))[:70] if found else normalized(source)[:70]


def _by_rule(test: str, result: Mapping[str, Any], line: str, expected: str) -> Verdict | None:
    values = {
        "type": str(result.get("type")), "text": str(result.get("text")), "line": line, "test": test,
        "expected": expected, "method": str(result.get("method")), "fields": " ".join(result.get("fields", ())),
        "causes": "\n".join(result.get("causes", ())),
    }  # fmt: skip
    for reason in REASONS:
        if reason.kind == "c" and "raises(" in expected:  # PEFT refuses it, too: only the words may differ
            continue
        matches = [(re.search(pattern, values[key], re.DOTALL)) for key, pattern in reason.patterns.items()]
        if all(matches):
            groups = [group for match in matches if match for group in match.groups() if group]
            return Verdict(reason.kind, reason.words.format(*groups))
    return None


def classify(test: str, result: Mapping[str, Any]) -> Verdict:
    """The class and the reason of a test that fails with the façade and passes with PEFT."""
    kind, text = str(result.get("type")), str(result.get("text"))
    line = (result.get("tests") or [[None, 0, "", ""]])[-1][3] or ""
    expected = expectation(result)
    hidden = [cause for cause in result.get("causes", ()) if cause.startswith("Missing: ")]
    if kind == "Missing" or hidden:
        text = hidden[0].removeprefix("Missing: ") if hidden else text
        name = text.rpartition(".")[2]
        public = text.count(".") == 1 or name.endswith("Config") or text.startswith("peft.optimizers")
        return Verdict("a" if public else "b", text)
    if verdict := _by_rule(test, result, line, expected):
        return verdict
    refusal = text if "SurgeryError" in result.get("classes", ()) else "".join(result.get("causes", ()))
    if "DID NOT RAISE" not in text and (match := re.search(r"PEFT's (\w+)=.* can't be held", refusal)):
        return Verdict("c", f"`{match[1]}`")
    if "raises(" in expected and not text.startswith("DID NOT"):
        return Verdict("e", f"an error's {'words' if 'Regex pattern' in text else 'type'}: {_expected(expected, text)}")
    if "warns(" in expected and (kind == "Failed" or "Regex" in text):
        return Verdict("e", f"a warning: {_expected(expected, text)}")
    if kind == "AttributeError" and (match := re.search(r"no attribute '(\w+)'", text)):
        internal = re.fullmatch(INTERNAL_ATTRIBUTE, match[1])
        return Verdict("b" if internal else "d", f"attribute `{match[1]}`")
    if kind == "AssertionError" and (match := re.search(INTERNAL_LINE, line)):
        return Verdict("b", f"looks at `{match[0].strip('.(')}`")
    if kind == "AssertionError" and any(use.rpartition(".")[2] in line for use in result.get("uses", ())):
        return Verdict("b", f"isinstance of `{result['uses'][0].rpartition('.')[2]}`")
    return Verdict("d", f"{kind}: {normalized(text)[:100]} — {normalized(line)[:90]}")


def causes(facade: Mapping[str, Mapping[str, Any]]) -> list[Cause]:
    """All causes: by class, and those that cost most tests first."""
    found: dict[Verdict, Cause] = {}
    for test, result in facade.items():
        if result["outcome"] == "failed":
            verdict = classify(test, result)
            cause = found.setdefault(verdict, Cause(verdict))
            cause.tests.append(test)
            cause.lines[(result.get("tests") or [["", 0, "", ""]])[-1][3] or ""] += 1
    return sorted(found.values(), key=lambda cause: (cause.verdict.kind, -len(cause.tests)))


def count(base: Mapping[str, Any], facade: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """By file: what passes with PEFT, what passes with the façade, and the failures by class."""
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for test, result in base.items():
        counter = by_file[file_of(test)]
        counter[f"base {result['outcome']}"] += 1
        if result["outcome"] == "passed" and test in facade:
            outcome = facade[test]["outcome"]
            counter["run"] += 1
            counter[classify(test, facade[test]).kind if outcome == "failed" else outcome] += 1
    return by_file
