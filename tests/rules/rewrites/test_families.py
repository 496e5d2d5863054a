"""The ready-made rewrites on three families, by the report that takes all of them (`make rewrites`)."""

from __future__ import annotations

import pytest

from tests.reports.rewrites import REWRITES, page, rows_of
from tests.support.families import FAMILIES

pytest.importorskip("transformers")

EXPECTED = {
    "llama": {"fuse_attention", "fuse_rms_norm", "fuse_linears (3)", "fuse_linears (2)", "NoOpsRule"},
    "gpt2": {"fuse_attention", "fuse_gelu (tanh)", "NoOpsRule", "centre_layer_norm"},
    "cohere": {"fuse_attention", "fuse_layer_norm", "fuse_linears (3)", "fuse_linears (2)", "NoOpsRule", "ShareRule"},
}


@pytest.mark.filterwarnings("ignore::surgery.SurgeryWarning")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_family(name: str) -> None:
    rows = list(rows_of(FAMILIES[name]))
    assert {row.rewrite for row in rows if not row.refused} == EXPECTED[name]
    assert EXPECTED[name] <= REWRITES.keys() and f"| {name} |" in page(rows, 1)
    for row in rows:
        # float32 sums of other orders, through a model of two layers
        assert row.outputs < 1e-5, row
        assert (row.gradients is None) == (row.rewrite == "centre_layer_norm") and (row.gradients or 0) < 1e-4, row
