"""Runs PEFT's own tests twice, with PEFT and with `surgery.peft` in its place: `make peft-suite PEFT_SOURCE=…`.

None of PEFT's code is kept here. Its source of the pinned version is given as a folder: the wheel has no tests, the
source distribution has. Tests that pass with PEFT are run again with the façade; a test that then fails gets a class
and a reason (`classes.py`, `reasons.py`), and docs/reference/peft-suite.md gets the table.
"""

from tests.support import ROOT

OUT = ROOT / "out/peft-suite"
PACKAGE = "peft_tests"  # the copies' package: `tests` is this project's
SHIM = "peft_facade"  # what `peft` is called in the façade's copy, so that transformers keeps the real one
SIDES = ("base", "facade")
