"""Values at which files and models may differ: empty masks, ties, large and negative numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SurgeryError, export_onnx, verify_onnx
from surgery.errors import ParityError
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.calls.varied_values import other_values
from tests.support import tiny
from tests.support.onnx_checks import assert_near, feeds, session
from tests.support.sampling import LAYERS, onnx_cases

onnx: Any = pytest.importorskip("onnx")
INF, NAN, LOWEST = math.inf, math.nan, torch.finfo(torch.float32).min


def run(path: Path, *tensors: Tensor) -> list[list[np.ndarray]]:
    """With onnxruntime's optimiser and without."""
    outputs = []
    for optimised in (True, False):
        runtime = session(path, optimised)
        names = [node.name for node in runtime.get_inputs()]
        assert len(names) == len(tensors)
        outputs.append(runtime.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}))
    return outputs


# Attention ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Every kind of mask in several shapes, and other arguments of attention."""

    def forward(self, q: Tensor, passed: Tensor, column: Tensor, shared: Tensor) -> list[Tensor]:
        sdpa = F.scaled_dot_product_attention
        scores = torch.zeros(passed.shape)
        masked = [scores.masked_fill(~passed, low) for low in (-INF, LOWEST)]
        return [
            sdpa(q, q, q, attn_mask=passed),
            *(sdpa(q, q, q, attn_mask=mask) for mask in masked),
            sdpa(q, q, q, attn_mask=column),
            sdpa(q[:, 0], q[:, 1], q[:, 1], attn_mask=masked[0][:, 0], scale=-0.7),
            sdpa(q, shared, shared, enable_gqa=True, scale=0.3),
            sdpa(q, q[:1], q[:1], attn_mask=passed),
            sdpa(q, shared[:, :1, :3], shared[:, :1, :3], is_causal=True),
            sdpa(q, q, q, enable_gqa=True),
        ]


def by_hand(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """The expected output in float64; a row of the mask that is empty gives zeros."""
    q, k = q.double(), k.double()
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return torch.where(torch.isneginf(scores).all(-1, keepdim=True), 0.0, weights) @ k


@pytest.mark.parametrize("opset", onnx_cases([18, None, 23, 25], 23))
def test_attention_whose_masks_let_nothing_through(opset: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, shared = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6)
    passed, column = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), torch.ones(2, 1, 5, 1, dtype=torch.bool)
    path = export_onnx(Attention(), tmp_path / "m.onnx", (q, passed, column, shared), opset=opset, dynamic=False).path
    passed, column = passed.clone(), column.clone()
    passed[0, 0, 2], passed[1, 0, :3], column[1, 0, 4] = False, False, False
    low = [torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~passed, fill) for fill in (-INF, LOWEST)]
    wide, narrow = shared.repeat_interleave(2, 1), shared[:, :1, :3].expand(2, 4, 3, 6)
    wanted = [
        by_hand(q, q, mask=passed),
        *(by_hand(q, q, mask=mask) for mask in low),
        by_hand(q, q, mask=column),
        by_hand(q[:, 0], q[:, 1], -0.7, low[0][:, 0]),
        by_hand(q, wide, 0.3),
        by_hand(q, q[:1].expand_as(q), mask=passed),
        by_hand(q, narrow, mask=torch.ones(5, 3, dtype=torch.bool).tril()),
        by_hand(q, q),
    ]
    for outputs in run(path, q, passed, column, shared):
        for index, (have, want) in enumerate(zip(outputs, wanted, strict=True)):
            np.testing.assert_allclose(have, want.numpy(), rtol=0, atol=1e-5, err_msg=f"output {index}")
    operations = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert ("Attention" in operations) == ((opset or 0) >= 23)


def test_an_empty_row_where_onnxruntimes_own_operations_are_put_in(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, passed: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=passed)

    q, passed = torch.randn(2, 2, 4, 6), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    report = export_onnx(Plain(), tmp_path / "m.onnx", (q, passed), optimize_for="ort")
    assert report.parity is not None and not report.parity.notices
    passed = passed.clone()
    passed[1, 0, 2] = False
    for (actual,) in run(report.path, q, passed):
        np.testing.assert_allclose(actual, by_hand(q, q, mask=passed).numpy(), rtol=0, atol=1e-5)


def test_softmax_over_nothing_is_nan_on_both_sides(tmp_path: Path) -> None:
    """Without the operator it is 0 / 0; NaNs in the same place are equal."""

    class Written(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).masked_fill(~mask, -INF).softmax(-1) @ x

    x, mask = torch.randn(2, 4, 3), torch.ones(2, 4, 4, dtype=torch.bool).tril()
    report = export_onnx(Written(), tmp_path / "m.onnx", (x, mask)).parity
    assert report is not None and report.ok and not report.notices
    assert all(comparison.ok for comparison in report.compared if comparison.values == "masks with an empty row")
    mask = mask.clone()
    mask[0, 1] = False
    for (output,) in run(tmp_path / "m.onnx", x, mask):
        assert np.isnan(output[0, 1]).all() and np.isnan(output).sum() == 3


def test_torchs_own_kernel_for_evaluation_is_told_where_it_gives_nan(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.a(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    model, x, mask = Masked().eval(), torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    report = export_onnx(model, tmp_path / "m.onnx", (x, mask))
    assert report.parity is not None and report.parity.ok
    (notice,) = report.parity.notices
    assert notice.startswith("with masks with an empty row torch's fast kernel")
    mask = mask.clone()
    mask[1] = True
    with torch.no_grad():
        assert model(x, mask)[1].isnan().all()
    trained = model(x, mask).detach()  # with gradients: the path that training takes
    for (actual,) in run(report.path, x, mask):
        np.testing.assert_allclose(actual, trained.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", onnx_cases(["llama", "bert"], "bert"))
def test_padding_on_either_side_and_empty_texts(name: str, tmp_path: Path) -> None:
    """transformers' masks: a text with nothing in it, too, is what the live model gives."""
    model, example = getattr(tiny, name)(LAYERS)
    example["attention_mask"] = torch.ones_like(example["input_ids"])
    report = export_onnx(model.eval(), tmp_path / "m.onnx", example)
    assert report.parity is not None and not report.parity.notices
    assert {comparison.values for comparison in report.parity.compared} == {
        "", "padded texts", "masks with an empty row", "repeated tokens",
    }  # fmt: skip
    example["attention_mask"] = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        wanted = model(**example).logits
    fed = feeds(model, example, report.manifest["inputs"])
    for optimised in (True, False):
        actual = session(report.path, optimised).run(["logits"], fed)
        assert_near(actual, [wanted])


# Operations --------------------------------------------------------------------------------------------------------

X = torch.tensor([INF, -INF, 0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0, 1e30, -1e30, 2e4])
Y = torch.tensor([3.0, -3.0, -2.0, 0.1, 0.1, 0.7, -0.7, 0.0, 0.0, -2.0, 101.0, -3.0, 7.0, 1e30, 0.3])
I = torch.tensor([-7, 7, -6, 6, -1, 1, 0, 5, -5, 2**31 + 1, -(2**31) - 3, 2**40 + 1])  # noqa: E741
J = torch.tensor([2, -2, 3, -3, 7, -7, 4, 5, -5, 3, 5, 7])
M = torch.tensor([[1.0, 1, 1], [2, 3, 3], [-INF, -INF, -INF], [INF, 1, -INF], [0.0, -0.0, 0.0]])
MIXED: dict[str, Any] = {
    "logsigmoid": lambda x, y, i, j, m: F.logsigmoid(x),
    "logaddexp": lambda x, y, i, j, m: torch.logaddexp(x, y),
    "atan2": lambda x, y, i, j, m: torch.atan2(y, x),
    "floor of a quotient": lambda x, y, i, j, m: torch.div(x[2:], 0.1, rounding_mode="floor"),
    "//": lambda x, y, i, j, m: x[2:] // y[2:],
    "trunc": lambda x, y, i, j, m: torch.div(x, 0.7, rounding_mode="trunc"),
    "%": lambda x, y, i, j, m: x[2:12] % y[2:12],
    "% inf": lambda x, y, i, j, m: x[2:] % INF,
    "fmod": lambda x, y, i, j, m: torch.fmod(x[2:12], y[2:12]),
    "whole //": lambda x, y, i, j, m: i // j,
    "whole floor": lambda x, y, i, j, m: torch.div(i, j, rounding_mode="floor"),
    "whole trunc": lambda x, y, i, j, m: torch.div(i, j, rounding_mode="trunc"),
    "whole by a number": lambda x, y, i, j, m: torch.div(i, 3, rounding_mode="floor"),
    "int32": lambda x, y, i, j, m: torch.div(i[:9].int(), j[:9].int(), rounding_mode="floor"),
    "whole %": lambda x, y, i, j, m: i % j,
    "whole fmod": lambda x, y, i, j, m: torch.fmod(i, j),
    "whole by a fraction": lambda x, y, i, j, m: torch.div(i[:9], 2.5, rounding_mode="floor"),
    "round": lambda x, y, i, j, m: x[:12].round(),
    "argmax": lambda x, y, i, j, m: torch.stack([m.argmax(-1), m.argmin(-1), m.max(-1)[1]]),
    "cumsum": lambda x, y, i, j, m: (i > 0).cumsum(0),
    "clamp": lambda x, y, i, j, m: x.clamp(2, 1),
    "softmax": lambda x, y, i, j, m: m.softmax(-1),
    "logsumexp": lambda x, y, i, j, m: m.logsumexp(-1),
    "one_hot": lambda x, y, i, j, m: F.one_hot(i[:9].clamp(0, 3), 4),
    "pool": lambda x, y, i, j, m: F.max_pool2d(m[None], 3, 2, 1),
    "average": lambda x, y, i, j, m: F.avg_pool2d(m[None, :2], 2, divisor_override=3),
    "average of 3": lambda x, y, i, j, m: F.avg_pool3d(m[None, None, :2], (1, 2, 2), divisor_override=5),
}


def test_operations_at_their_edges(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor, i: Tensor, j: Tensor, m: Tensor) -> list[Tensor]:
            return [function(x, y, i, j, m) for function in MIXED.values()]

    plain = (torch.ones_like(X), torch.ones_like(Y), torch.ones_like(I), torch.ones_like(J), torch.ones_like(M))
    path = export_onnx(Mixed(), tmp_path / "m.onnx", plain, dynamic=False, verify=False).path
    wanted = Mixed()(X, Y, I, J, M)
    for outputs in run(path, X, Y, I, J, M):
        for name, have, want in zip(MIXED, outputs, wanted, strict=True):
            np.testing.assert_allclose(have, want.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_operations_in_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
            whole = torch.div(x, y, rounding_mode="trunc")
            return [F.logsigmoid(x), torch.logaddexp(x, y), x // y, x % y, whole]

    x, y = torch.tensor([0.5, -200, 300, 7, -7.0]), torch.tensor([2.0, -201, 300, -2, 2])
    export_onnx(Mixed(), tmp_path / "m.onnx", (torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype)), dynamic=False)
    wanted = Mixed()(x.to(dtype), y.to(dtype))
    for outputs in run(tmp_path / "m.onnx", x.to(dtype), y.to(dtype)):
        for have, want in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(have, want.numpy(), rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


# What can't be mended is told --------------------------------------------------------------------------------------


def test_large_numbers_that_a_file_loses_are_told(tmp_path: Path) -> None:
    """softplus is written as log(1 + exp(x)) in this file, which ends at 88: right for the example alone."""

    class Soft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x)

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(1 + torch.exp(x))

    x = torch.randn(3, 4)
    path = export_onnx(Written(), tmp_path / "m.onnx", x, verify=False).path
    report = verify_onnx(path, Soft(), x)
    assert report.ok and [
        comparison
        for comparison in report.compared
        if not comparison.ok and comparison.values == "large numbers" and comparison.edge
    ]
    (notice,) = report.notices
    assert notice.startswith("with large numbers the file and the model differ") and notice in str(report)


def test_padded_texts_that_a_file_gets_wrong_are_an_error(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self, masked: bool) -> None:
            super().__init__()
            self.a, self.masked = nn.Embedding(9, 4), masked

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            weights = attention_mask[..., None].float()
            return (self.a(input_ids) * (weights if self.masked else weights * 0 + 1)).sum(1)

    model, other = Mean(True), Mean(False)
    other.load_state_dict(model.state_dict())
    example = {"input_ids": torch.randint(9, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    path = export_onnx(other, tmp_path / "m.onnx", example, verify=False).path
    with pytest.raises(ParityError, match="padded texts") as caught:
        verify_onnx(path, model, example)
    assert all(comparison.ok for comparison in caught.value.report.compared if not comparison.values)


def test_what_is_varied() -> None:
    t = torch.tensor
    values = {
        "input_ids": t([[1, 2, 3], [4, 5, 6]]), "attention_mask": t([[1, 1, 1], [1, 1, 1]]), "x": t([0.5, -2.0]),
        "bias_mask": t([[0.0, -INF], [0.0, 0.0]]), "past_key_values": [t([1.0])], "seen": t([True]), "n": 3,
    }  # fmt: skip
    varied = {variation.description: variation.call.values for variation in other_values(ExampleCall(values))}
    assert varied["padded texts"]["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert varied["masks with an empty row"]["attention_mask"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert varied["masks with an empty row"]["bias_mask"].tolist() == [[-INF, -INF], [0, 0]]
    assert varied["repeated tokens"]["input_ids"].tolist() == [[1, 1, 1], [4, 4, 4]]
    assert varied["zeros"]["x"].tolist() == [0, 0] and varied["large numbers"]["x"].tolist() == [500, -2000]
    assert all(
        call_values["past_key_values"][0] is not None and call_values["n"] == 3 for call_values in varied.values()
    )
    assert varied["zeros"]["past_key_values"][0].item() == 1 and varied["zeros"]["bias_mask"] is values["bias_mask"]


# Shapes that onnx infers otherwise ----------------------------------------------------------------------------------

POOLS = {
    "AvgPool1d": (nn.AvgPool1d(2, 3, ceil_mode=True), (2, 3, 6)),
    "MaxPool2d": (nn.MaxPool2d(2, 3, ceil_mode=True), (2, 3, 6, 6)),
    "LPPool2d": (nn.LPPool2d(2.0, 2, 3, ceil_mode=True), (2, 3, 6, 6)),
    "AvgPool3d": (nn.AvgPool3d(2, 3, ceil_mode=True), (2, 3, 6, 6, 6)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_window_that_begins_in_the_padding(name: str, tmp_path: Path) -> None:
    """onnx counts it before opset 22; torch and onnxruntime leave it out."""
    pool, shape = POOLS[name]
    x = torch.randn(shape)
    report = export_onnx(pool, tmp_path / "m.onnx", x, dynamic=False)
    assert report.parity is not None
    (notice,) = report.parity.notices
    assert "infers other shapes" in notice and "opset=22" in notice
    for (actual,) in run(report.path, x):
        np.testing.assert_allclose(actual, pool(x).numpy(), rtol=1e-5, atol=1e-6)
    newer = export_onnx(pool, tmp_path / "n.onnx", x, opset=22, dynamic=False)
    assert newer.parity is not None and not newer.parity.notices


def test_what_the_checker_refuses_else_is_an_error(tmp_path: Path) -> None:
    path = export_onnx(nn.Sequential(nn.Linear(3, 2)), tmp_path / "m.onnx", torch.randn(2, 3)).path
    loaded = onnx.load(str(path))
    loaded.graph.node[0].attribute.append(onnx.helper.make_attribute("invented", 1))
    onnx.save(loaded, str(path))
    with pytest.raises(SurgeryError):
        verify_onnx(path, nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
