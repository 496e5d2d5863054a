"""What runs PEFT's own tests: the shim that stands in PEFT's place, the copies, and the classes of failures."""

import importlib
import re
import sys

import pytest

pytest.importorskip("peft")

import surgery.peft  # noqa: E402
from tests.reports.peft_suite import SHIM, classes, shim, source  # noqa: E402
from tests.reports.peft_suite.reasons import REASONS  # noqa: E402
from tests.support import ROOT  # noqa: E402


@pytest.fixture
def facade():
    """The shim, importable during a test."""
    shim.provide()
    try:
        yield importlib.import_module(SHIM)
    finally:
        sys.meta_path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == SHIM]:
            del sys.modules[name]


def test_names_of_the_facade_are_found_under_pefts_paths(facade):
    lora = importlib.import_module(f"{SHIM}.tuners.lora")
    assert lora.LoraConfig is facade.LoraConfig is surgery.peft.LoraConfig
    assert facade.get_peft_model is surgery.peft.get_peft_model
    with pytest.raises(AttributeError):
        _ = facade.no_such_name


def test_a_name_that_does_not_exist_is_a_placeholder(facade):
    absent = facade.PolyConfig
    assert absent() is not absent()  # while tests are collected
    with shim.STATE.test() as uses:
        assert not isinstance(surgery.peft.LoraConfig(), absent)
        with pytest.raises(shim.Missing, match="^peft.PolyConfig$"):
            absent()
    assert uses == {"peft.PolyConfig"}


def test_imports_of_peft_become_imports_of_the_shim():
    text = "import peft\nfrom peft.utils import x\n    import peft.optimizers.y as y\nfrom transformers import peft\n"
    for pattern, new in source.REDIRECTS:
        text = pattern.sub(new, text)
    assert text == (
        f"import {SHIM} as peft\nfrom {SHIM}.utils import x\n    import {SHIM}.optimizers.y as y\n"
        "from transformers import peft\n"
    )


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        ({"type": "Missing", "text": "peft.PolyConfig"}, ("a", "peft.PolyConfig")),
        ({"type": "Missing", "text": "peft.tuners.lora.layer.Linear"}, ("b", "peft.tuners.lora.layer.Linear")),
        (
            {"type": "AttributeError", "text": "'Linear' object has no attribute 'lora_A'"},
            ("b", "`lora_A` of PEFT's layers"),
        ),
        (
            {
                "type": "PlanError",
                "classes": ["PlanError", "SurgeryError"],
                "text": "PEFT's use_qalora=True can't be held",
            },
            ("c", "`use_qalora`"),
        ),
        ({"type": "AssertionError", "text": "assert 1 == 2"}, ("d", "AssertionError: assert # == # — ")),
    ],
)
def test_failures_are_put_into_classes(result, verdict):
    found = classes.classify("test_x.py::test_y", result)
    assert (found.kind, found.reason) == verdict


def test_every_rule_has_a_class_and_patterns():
    for reason in REASONS:
        assert reason.kind in classes.KINDS and reason.words and reason.patterns
        for key, pattern in reason.patterns.items():
            assert key in {"type", "text", "line", "test", "expected", "method", "fields", "causes"}
            re.compile(pattern)


def test_the_pages_name_what_does_not_exist():
    import peft

    pages = [ROOT / "docs/reference" / name for name in ("peft-names.md", "peft-differences.md")]
    of_names, of_all = (set(re.findall(r"`([\w.]+)`", "".join(page.read_text(encoding="utf-8") for page in chosen)))
                        for chosen in (pages[:1], pages))  # fmt: skip
    absent = {name for name in peft.__all__ if name not in surgery.peft.__all__}
    assert absent and not absent - of_names
    reasons = [reason.words for reason in REASONS if reason.kind == "a"]
    assert not {name for words in reasons for name in re.findall(r"peft\.(\w+)", words)} - of_all
    assert not {name for words in reasons for name in re.findall(r"^`([\w.]+)`", words)} - of_all
