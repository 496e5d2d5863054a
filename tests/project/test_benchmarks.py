"""The benchmarks run; how fast things are is measured by `make bench`, never by a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import growth, models, report, several
from tests.benchmarks.lines import LINES, Row
from tests.benchmarks.timing import Setting


def test_a_line_runs() -> None:
    pytest.importorskip("peft")
    first, second = LINES["saved"](Setting(rounds=1, sample=0.0, quick=True))
    assert "Llama" in first.work and "MiniLM" in second.work and 0.3 < first.figure < 1.0


@pytest.mark.slow("two lines of the benchmarks with many adapters: test_a_line_runs runs one line")
def test_many_adapters_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    full = models._llama
    monkeypatch.setattr(
        models, "_llama", lambda layers, hidden, inner, heads, *how: full(2, 8 * heads, 64, heads, *how)
    )
    setting = Setting(rounds=1, sample=0.0, quick=True)
    (switched,) = several.LINES["switch"](setting)
    assert "on 56 Linears" in switched.work and 0 < switched.figure
    routed = list(several.LINES["rows"](setting))
    assert [row.to for row in routed] == ["base", "", "base", ""] and all(row.peft for row in routed[::2])


def test_growth_is_told_by_its_exponent() -> None:
    spent = {"a": {1: 0.5, 10: 0.5, 100: 0.5}, "b": {1: 1.0, 10: 10.0, 100: 100.0}, "c": {1: 1.0, 10: 31.6, 100: 1e3}}
    rows = list(growth._rows("layers", spent, dict.fromkeys(spent, 0.9)))
    assert [row.work.rpartition(": ")[2] for row in rows] == ["c", "b"]
    assert rows[0].figure == pytest.approx(1.5, abs=1e-3) and rows[1].figure == pytest.approx(1.0)


def test_the_page_keeps_other_devices_and_tells_what_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "machine", lambda setting: f"on {setting.device}")
    met = Row("forward: tiny", "base", 1.07, 1.05, 1.2)
    missed = Row("training step: tiny", "base", 1.5, 1.4, 1.3, below_peft=True)
    report.write([met], Setting("cuda"))
    report.write([met, missed], Setting())
    page = report.write([met, missed], Setting()).read_text(encoding="utf-8")
    assert page.startswith("# Benchmarks") and page.count("## CPU") == page.count("## GPU") == 1
    assert "| forward: tiny | ≤ 1.07 × base | 1.05 | 1.20 | yes |" in page
    assert "| training step: tiny | ≤ 1.5 × base and below PEFT | 1.40 | 1.30 | no |" in page
    assert page.count("Aims that are missed") == 1 and "not yet looked into" in page
