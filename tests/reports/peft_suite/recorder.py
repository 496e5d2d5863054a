"""A pytest plugin that runs PEFT's tests on one side and writes a line of JSON for each.

Environment: PEFT_SUITE_SIDE, "base" or "facade"; PEFT_SUITE_RESULTS, the file; PEFT_SUITE_PASSED, a file with the ids
that are to be run (all if it is not set); PEFT_SUITE_SECONDS, the limit of one test; PEFT_SUITE_EVERY, a number n:
of the tests of a function and configuration class, the first and about each nth other one are run.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest

import surgery.peft
from tests.reports.peft_suite import PACKAGE, foreign, shim

SIDE = os.environ.get("PEFT_SUITE_SIDE", "")
RESULTS = Path(os.environ.get("PEFT_SUITE_RESULTS", os.devnull))
SECONDS = int(os.environ.get("PEFT_SUITE_SECONDS", "120"))
EVERY = int(os.environ.get("PEFT_SUITE_EVERY", "1"))

foreign.provide()
if SIDE == "facade":
    shim.provide()


def write(line: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def method_of(item: Any) -> str:
    """The configuration class among a test's parameters, by its name in PEFT; "" if there is none."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            name = (part if isinstance(part, type) else type(part)).__name__
            if name.endswith("Config") and hasattr(peft, name):
                return name
    return ""


def fields_of(item: Any) -> list[str]:
    """The fields of a configuration among a test's parameters."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return sorted({str(key) for value in parameters.values() if isinstance(value, dict) for key in value})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out tests that have a result, are not in the sample, or whose configuration the façade does not have."""
    finished = {json.loads(line).get("id") for line in RESULTS.read_text().splitlines()} if RESULTS.is_file() else set()
    passed = os.environ.get("PEFT_SUITE_PASSED")
    chosen = set(Path(passed).read_text(encoding="utf-8").splitlines()) if passed else None
    seen: set[Any] = set()
    kept, others = [], []
    for item in items:
        method, function = method_of(item), getattr(item, "originalname", None) or item.name
        group = (item.fspath, item.cls, function, method)
        first, _ = group not in seen, seen.add(group)
        absent = method != "" and method not in surgery.peft.__all__
        if chosen is None and absent and item.nodeid not in finished:
            write({"id": item.nodeid, "outcome": "absent", "method": method})
        skip = absent or item.nodeid in finished or (chosen is not None and item.nodeid not in chosen)
        sampled = first or method == "" or zlib.crc32(item.nodeid.encode()) % EVERY == 0
        (others if skip or not sampled else kept).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


def _too_long(*args: Any) -> None:
    raise TimeoutError(f"the test ran longer than {SECONDS} s")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    with shim.STATE.test() if SIDE == "facade" else nullcontext():
        yield
    signal.alarm(0)


def _describe(error: BaseException, trace: Any) -> dict[str, Any]:
    """An exception as data: its classes, its text, the lines of the tests that led to it, and where it was raised."""
    frames = [(Path(f.filename).name, f.lineno, f.name, f.line, f.filename) for f in traceback.extract_tb(trace)]
    tests = [frame[:4] for frame in frames if f"/{PACKAGE}/" in frame[4]]
    causes, cause = [], error.__cause__ or error.__context__
    while cause is not None and len(causes) < 3:
        causes.append(f"{type(cause).__name__}: {str(cause)[:300]}")
        cause = cause.__cause__ or cause.__context__
    return {
        "type": type(error).__name__,
        "classes": [kind.__name__ for kind in type(error).__mro__][:6],
        "text": str(error)[:1200],
        "tests": tests[-4:],
        "raised": [f"{frame[4].rpartition('site-packages/')[2]}:{frame[1]} {frame[2]}" for frame in frames[-2:]],
        "causes": causes,
    }


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.outcome == "passed" and report.when != "call":
        return
    line = {"id": report.nodeid, "outcome": report.outcome, "method": method_of(item), "s": round(report.duration, 2)}
    if report.outcome == "failed":
        if call.excinfo is not None:
            line |= _describe(call.excinfo.value, call.excinfo.tb)
        line |= {"when": report.when, "uses": sorted(shim.STATE.uses), "fields": fields_of(item)}
    elif report.outcome == "skipped":
        line["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[-200:]
    write(line)
