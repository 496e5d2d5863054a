"""A list of all failures by cause, for those who mend them: `python -m tests.reports.peft_suite.report`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.reports.peft_suite import OUT, PACKAGE, classes, run
from tests.reports.peft_suite.page import share


def failures() -> Path:
    """Write out/peft-suite/failures.md: every cause with its tests, those that cost most first."""
    base, facade = run.results("base"), run.results("facade")
    facade = {test: result for test, result in facade.items() if base.get(test, {}).get("outcome") == "passed"}
    by_file = classes.count(base, facade)
    total: Counter[str] = Counter()
    page = [
        "| file | passes with PEFT, run with the façade | passes | a | b | c | d | e | f | share |",
        "|---" * 10 + "|",
    ]
    for counter in by_file.values():
        total.update(counter)
    for name, counter in [*sorted(by_file.items()), ("all", total)]:
        numbers = [counter[key] for key in ("run", "passed", *classes.KINDS)]
        page.append(f"| {name} | {' | '.join(map(str, numbers))} | {share(counter)} |")
    found = classes.causes(facade)
    for kind in "decabf":
        chosen = [cause for cause in found if cause.verdict.kind == kind]
        page += ["", f"## ({kind}) {classes.KINDS[kind]}: {sum(len(cause.tests) for cause in chosen)}", ""]
        for cause in chosen:
            functions = Counter(test.partition("::")[2].partition("[")[0] for test in cause.tests)
            methods = Counter(facade[test].get("method") for test in cause.tests)
            line = cause.lines.most_common(1)[0][0]
            page += [f"- **{len(cause.tests)}** {cause.verdict.reason}", f"    - line: `{line[:160]}`"]
            page.append("    - " + ", ".join(f"{name} {n}" for name, n in functions.most_common(5)))
            page.append("    - " + ", ".join(f"{name or '-'} {n}" for name, n in methods.most_common(8)))
            sample = cause.tests[0]
            text = " | ".join(str(facade[sample].get("text")).splitlines()[:4])[:260]
            page.append(f"    - e.g. `{sample.removeprefix(PACKAGE + '/')}`: {facade[sample].get('type')}: {text}")
            page.append(f"    - raised at {facade[sample].get('raised')}")
    path = OUT / "failures.md"
    path.write_text("\n".join(page) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(failures())
