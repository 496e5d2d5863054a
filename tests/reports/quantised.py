"""`make quantised`: each quantised layout with adapters, checked step by step, into docs/reference/quantised.md.

A row is an entry of `ROWS`: a name, the package that must be there, and a function that makes a quantised Linear from a
plain one. Add an entry for another layout. A package that is not installed gives a row with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    apply_rules,
    deactivate,
    export_onnx,
    load_adapter,
    merge,
    packed_weight_of,
    remove,
    route,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import LoraRule
from tests.reports.packed_stacks import stack_table
from tests.support import ROOT
from tests.support.packed_layers import HQQLinear, QuantLinear, TorchLinear, WQLinear_GEMM
from tests.support.quantised import BACKENDS, QuantisedLinear

PAGE = ROOT / "docs" / "reference" / "quantised.md"
MERGES = "quantised" in inspect.signature(merge).parameters
BEGIN, END = "<!-- made by make quantised -->", "<!-- end of make quantised -->"


def _quanto(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        quanto: Any = importlib.import_module("optimum.quanto")
        model = nn.Sequential(linear)
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        return model[0]

    return make


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        hqq: Any = importlib.import_module("hqq.core.quantize")
        settings = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        linear.requires_grad_(False)  # a bias with a gradient can't be copied by copy.deepcopy
        return hqq.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")

    return make


def _gptqmodel(file: str, name: str, stand_in: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    """A layer of gptqmodel with the buffers of a stand-in: 4 bits, groups of 32."""

    def make(linear: nn.Linear) -> nn.Module:
        made: Any = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{file}"), name)
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
        layer = made(bits=4, group_size=32, sym=False, desc_act=False, register_buffers=True, **sizes)
        layer.load_state_dict(stand_in(linear).state_dict())
        if hasattr(layer, "_init_wf_unsqueeze_buffers"):
            layer._init_wf_unsqueeze_buffers()
        return layer

    return make


def _int4(linear: nn.Linear) -> nn.Module:
    """A Linear with torchao's `Int4Tensor`, groups of 32; torchao's arithmetic stands in for the GPU's kernel."""
    int4: Any = importlib.import_module("torchao.quantization.quantize_.workflows.int4.int4_tensor")
    kernels: Any = torch.ops.mslk
    kernels.bf16i4bf16_rowwise = _plain_int4
    rows, columns = linear.weight.shape
    grid = torch.ones(columns // 32, rows)
    codes = torch.zeros(rows, columns // 2, dtype=torch.int8)
    linear.weight = nn.Parameter(int4.Int4Tensor(codes, grid, grid.clone(), [1, 32], linear.weight.shape), False)
    packed = packed_weight_of(linear)
    assert packed is not None
    packed.write(packed.requantise(torch.randn(rows, columns) / columns**0.5))
    return linear.requires_grad_(False)


def _plain_int4(x: Tensor, codes: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    api: Any = importlib.import_module("torchao.prototype.gptq.api")
    pairs = torch.stack((codes << 4 >> 4, codes >> 4), 2).flatten(1)  # shifts of int8 keep the sign
    return F.linear(x, api._int4_row_dequantize_zp(pairs, scales, shifts, 32))


def _fp8(linear: nn.Linear) -> nn.Module:
    """transformers' layer with blocks of 32 × 32; a plain kernel stands in for the GPU's."""
    fp8: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
    fp8.fp8_linear = _plain_fp8
    layer = fp8.FP8Linear(linear.in_features, linear.out_features, block_size=(32, 32), has_bias=True)
    packed = packed_weight_of(layer)
    assert packed is not None
    with torch.no_grad():
        layer.bias.copy_(linear.bias)
        packed.write(packed.requantise(linear.weight))
    return layer


def _plain_fp8(x: Tensor, weight: Tensor, scales: Tensor, block: tuple[int, int], bias: Any, *_: Any) -> Tensor:
    steps = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    return F.linear(x, weight.to(x.dtype) * steps, bias)


def _fp8_rows(file: str, name: str) -> Callable[[nn.Linear], nn.Module]:
    """A layer of transformers with one scale for each row; plain kernels stand in for the GPU's."""

    def make(linear: nn.Linear) -> nn.Module:
        integration: Any = importlib.import_module(f"transformers.integrations.{file}")
        integration.quantize_fp8_per_row = _unrounded
        integration._scaled_mm_rowwise = _plain_rows
        kernels: Any = torch.ops.fbgemm
        kernels.f8f8bf16_rowwise = _plain_fbgemm
        layer = getattr(integration, name)(linear.in_features, linear.out_features, True)
        packed = packed_weight_of(layer)
        assert packed is not None
        with torch.no_grad():
            layer.bias.copy_(linear.bias)
            packed.write(packed.requantise(linear.weight))
        return layer.requires_grad_(False)

    return make


def _unrounded(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return x, torch.ones(len(x))


def _plain_rows(x: Tensor, weight: Tensor, *, scale_b: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return (x @ weight.to(x.dtype)) * scale_b + bias


def _plain_fbgemm(x: Tensor, weight: Tensor, _: Tensor, scales: Tensor, **__: Any) -> Tensor:
    return (x @ weight.to(x.dtype).T) * scales.T


ROWS: list[QuantisedLinear] = [
    *BACKENDS,
    QuantisedLinear("torchao Int4Tensor", "torchao", _int4),
    QuantisedLinear("GPTQ QuantLinear, version 1", "torch", QuantLinear),
    QuantisedLinear("GPTQ TorchLinear, version 2, 3 bits", "torch", lambda linear: TorchLinear(linear, bits=3)),
    QuantisedLinear("AWQ WQLinear_GEMM", "torch", WQLinear_GEMM),
    QuantisedLinear("HQQ HQQLinear", "torch", lambda linear: HQQLinear(linear, dtype=torch.float32)),
    QuantisedLinear("transformers FP8Linear", "transformers.integrations.finegrained_fp8", _fp8),
    QuantisedLinear(
        "transformers CompressedTensorsFP8Linear",
        "transformers.integrations.compressed_tensors",
        _fp8_rows("compressed_tensors", "CompressedTensorsFP8Linear"),
    ),
    QuantisedLinear(
        "transformers FbgemmFp8Linear",
        "transformers.integrations.fbgemm_fp8",
        _fp8_rows("fbgemm_fp8", "FbgemmFp8Linear"),
    ),
    QuantisedLinear(
        "gptqmodel TorchLinear (GPTQ)",
        "gptqmodel.nn_modules.qlinear.torch",
        _gptqmodel("torch", "TorchLinear", lambda linear: TorchLinear(linear, group_size=32)),
    ),
    QuantisedLinear(
        "gptqmodel AwqTorchLinear",
        "gptqmodel.nn_modules.qlinear.torch_awq",
        _gptqmodel("torch_awq", "AwqTorchLinear", lambda linear: WQLinear_GEMM(linear, group_size=32)),
        exact=False,
        slack=3e-3,  # it computes in float16
    ),
    QuantisedLinear("hqq 4 bits", "hqq.core.quantize", _hqq(4)),
    QuantisedLinear("hqq 3 bits", "hqq.core.quantize", _hqq(3)),
    QuantisedLinear("optimum-quanto int8", "optimum.quanto", _quanto("qint8")),
    QuantisedLinear("optimum-quanto int4", "optimum.quanto", _quanto("qint4")),
    QuantisedLinear("optimum-quanto float8", "optimum.quanto", _quanto("qfloat8")),
]


class Model(nn.Module):
    def __init__(self, backend: QuantisedLinear):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = backend.build(nn.Linear(128, 128)), backend.build(nn.Linear(128, 64))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))))


class Case:
    """One layout: a new model for each check, and the same model with plain Linears of the dequantised weights."""

    def __init__(self, backend: QuantisedLinear):
        self.backend = backend
        self.slack = max(backend.slack, 1e-4)
        self.x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))

    def model(self, *rules: LoraRule) -> Any:
        model = Model(self.backend).eval()
        for rule in rules or (LoraRule(["up", "down"], rank=4, init="random"),):
            torch.manual_seed(2)
            apply_rules(model, rule)
        return model

    def plain(self, rule: LoraRule) -> Any:
        """The reference, with the same tensors of the adapter."""
        quantised = self.model(rule)
        model: Any = Model(self.backend).eval()
        for name in ("up", "down"):
            packed, layer = packed_weight_of(getattr(quantised, name)), getattr(model, name)
            assert packed is not None
            linear = nn.Linear(packed.shape[1], packed.shape[0])
            with torch.no_grad():
                linear.weight.copy_(packed.dequantise())
                linear.bias.copy_(layer.bias)
            setattr(model, name, linear)
        torch.manual_seed(2)
        apply_rules(model, rule)
        for name in (n for n in ("up", "down") if n in str(rule.targets)):
            getattr(model, name).adapters.load_state_dict(getattr(quantised, name).adapters.state_dict())
        return model

    def near(self, actual: Tensor, expected: Tensor, slack: float = 0.0) -> None:
        error = float((actual - expected).norm() / expected.norm())
        assert error <= (slack or self.slack), f"off by {error:.1%}"

    def bits(self, model: Any) -> list[Tensor]:
        found = []
        for name in ("up", "down"):
            packed = packed_weight_of(getattr(model, name))
            assert packed is not None
            found += [tensor.detach().flatten().view(torch.uint8).clone() for tensor in packed.tensors().values()]
        return found


def forward(case: Case) -> str:
    model, rule = case.model(), LoraRule(["up", "down"], rank=4, init="random")
    x = case.x
    for name in ("up", "down"):
        layer, params = getattr(model, name), getattr(model, name).adapters.default
        packed = packed_weight_of(layer)
        assert packed is not None
        y = F.linear(x, packed.dequantise().float(), layer.bias.float())
        x = torch.relu(y + 2.0 * x @ params.A.T @ params.B.T)
    case.near(model(case.x), model.head(x))
    case.near(model(case.x), case.plain(rule)(case.x))
    return "✔"


def train(case: Case) -> str:
    return _train(case, LoraRule(["up", "down"], rank=4, init="random"))


def dora(case: Case) -> str:
    return _train(case, LoraRule(["up", "down"], rank=4, init="random", dora=True))


def _train(case: Case, rule: LoraRule) -> str:
    packed = packed_weight_of(case.model().up)
    assert packed is not None
    if not packed.passes_gradient:  # nothing before the kernel trains as it would on plain weights
        rule = rule.replace(targets=["down"])
    results = []
    for model in (case.model(rule), case.plain(rule)):
        model.train()
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            model(case.x).square().mean().backward()
            optimiser.step()
        results.append([p.detach() for p in model.parameters() if p.requires_grad] + [model(case.x).detach()])
    for actual, expected in zip(*results, strict=True):
        case.near(actual, expected)
    return "✔" if packed.passes_gradient else "✔, no gradient through the kernel"


def merge_dequantised(case: Case) -> str:
    if not MERGES:
        return "–"
    model = case.model()
    live = model.train()(case.x).detach()  # kernels that round inputs in evaluation
    merge(model, quantised="dequantise")  # type: ignore[call-arg]
    case.near(model(case.x), live)
    return "✔"


def merge_requantised(case: Case) -> str:
    if not MERGES:
        return "–"
    model = case.model()
    for name in ("up", "down"):
        with torch.no_grad():
            getattr(model, name).adapters.default.B.mul_(0.05)
    report: Any = merge(model, quantised="requantise", limit=None)  # type: ignore[call-arg]
    assert type(model.up).__name__ == type(case.model().up).__name__
    return f"✔, {report.loss.share:.0%} of ‖ΔW‖ lost"


def inverse(case: Case) -> str:
    if not MERGES:
        return "–"
    for how in ("dequantise", "requantise"):
        model = case.model()
        live, before = model(case.x).detach(), case.bits(model)
        merge(model, quantised=how, **({} if how == "dequantise" else {"limit": None}))  # type: ignore[call-arg]
        unmerge(model)
        assert all(torch.equal(a, b) for a, b in zip(case.bits(model), before, strict=True)), how
        assert torch.equal(model(case.x), live), how
    return "✔"


def save(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = case.model()
        save_adapter(model, folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        packed = packed_weight_of(model.up)
        assert packed is not None and size < 4 * 2 * (4 * 128 * 3 + 4 * 64)
    return "✔"


def load(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = case.model(LoraRule(["up", "down"], rank=4, init="random", dora=True))
        save_adapter(model, folder)
        other = Model(case.backend).eval()
        load_adapter(other, folder)
        assert torch.equal(other(case.x), model(case.x))
        base = Model(case.backend).eval()
        remove(other)
        assert torch.equal(other(case.x), base(case.x)) and type(other.up) is type(base.up)
    return "✔"


def routed(case: Case) -> str:
    model, alone = Model(case.backend).eval(), []
    for name in ("a", "b"):
        deactivate(model) if alone else None
        apply_rules(model, LoraRule(["up", "down"], rank=4, init="random"), adapter=name)
        with using(model, name):
            alone.append(model(case.x).detach())
    with route(model, ["a", "b"] * 3):
        actual = model(case.x).detach()
    case.near(actual, torch.stack([alone[row % 2][row] for row in range(6)]))
    return "✔"


def onnx(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = case.model()
        for adapters in ("merged", "slots"):
            report: Any = export_onnx(model, Path(folder) / "model.onnx", case.x, adapters=adapters)  # type: ignore[arg-type]
            assert report.parity is not None and report.parity.ok
        packed = packed_weight_of(model.up)
        assert packed is not None
        if has_codes := packed.affine() is not None:
            coded: Any = export_onnx(model, Path(folder) / "codes.onnx", case.x, adapters="slots", weights="packed")
            assert coded.parity.ok and not any("plain numbers" in notice for notice in coded.notices)
        rounds = any("quantise their inputs" in notice for notice in report.notices)
    return "✔, " + ("dequantised and packed" if has_codes else "dequantised") + ", inputs not rounded" * rounds


CHECKS: dict[str, Callable[[Case], str]] = {
    "forward": forward,
    "train": train,
    "DoRA": dora,
    "merge dequantised": merge_dequantised,
    "merge requantised": merge_requantised,
    "inverse to the bit": inverse,
    "save": save,
    "load": load,
    "route": routed,
    "ONNX": onnx,
}


def cells(backend: QuantisedLinear) -> list[str]:
    """The row of one layout."""
    try:
        Model(backend)
    except ImportError as error:
        return [f"skipped: {_one_line(error)}", *[""] * (len(CHECKS) - 1)]
    return [_cell(check, backend) for check in CHECKS.values()]


def _cell(check: Callable[[Case], str], backend: QuantisedLinear) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check(Case(backend))
        except Exception as error:  # every failure is a cell of the table
            return f"✘ {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
    return str(text).splitlines()[0].replace("|", "/")[:90]


def table(rows: list[QuantisedLinear]) -> str:
    lines = [f"| layout | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for backend in rows:
        row = cells(backend)
        lines.append(f"| {backend.name} | {' | '.join(row)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _versions() -> str:
    packages = {row.package.replace("optimum.quanto", "optimum-quanto").partition(".")[0] for row in ROWS}
    names = ["torch", *sorted(packages - {"torch"})]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names of layouts; then the page is not written")
    names = parser.parse_args().names
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [row for row in ROWS if not names or any(name in row.name for name in names)]
    made = table(rows)
    if not names:
        made += f"\n\n{stack_table()}"
    if not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{_versions()}, on a CPU.\n\n{made}\n{END}{after}", encoding="utf-8")
    return int("✘" in made)


if __name__ == "__main__":
    raise SystemExit(main())
