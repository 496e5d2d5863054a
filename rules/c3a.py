"""C3A: ΔW consists of circulant blocks, so its product is a circular convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, Rule, Share, Site, SurgeryError, rule
from surgery.rules._linear import delta
from surgery.rules._shared import combining, complex_weights, fields, path_patterns
from surgery.rules._shared.solving import in_single


@rule("c3a")
class C3aRule(Rule):
    """y = W x + (1 / in) · C x: C consists of (out / b) · (in / b) circulant blocks of size b = `block_size`.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import C3aRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [C3aRule("0", block_size=8)])
    >>> tuple(model[0].adapters.default.kernel.shape)
    (2, 4, 8)

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). `kernel` (out / b, in / b, b) holds one row
    of each block, in float32 or in the module's float64, as the Fourier transform needs it. An exported graph contains
    C itself: ONNX has no products of complex numbers.

    Args:
        block_size: size of a block; default 256. It must divide both sizes of the weight.
        init: "xavier_uniform" (default), "kaiming_uniform", "gaussian" or "identity" (PEFT's init_weights=True: zero).
        block_size_pattern: path suffix or regular expression → block_size there; default None.

    Raises:
        RuleError: a field is out of range. A size that `block_size` does not divide is a problem of the plan.

    Source: Chen et al. 2024, arXiv:2407.19342; PEFT's C3AConfig, whose defaults these are.
    """

    block_size: int = 256
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "identity"] = "xavier_uniform"
    block_size_pattern: Mapping[str, int] | None = None

    linear = True

    def validate(self) -> None:
        fields.whole(self, "block_size")
        fields.whole_patterns(self, "block_size_pattern")
        fields.one_of(self, "init", "xavier_uniform", "kaiming_uniform", "gaussian", "identity")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def block_size_at(self, path: str) -> int:
        return path_patterns.first(self.block_size_pattern, path, self.block_size)

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        return fields.unused_patterns(self, paths, "block_size_pattern")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "it takes the real part of a Fourier transform"):
            return why
        if why := delta.why_no_map(module):
            return why
        (out, inner), size = delta.sizes(module), self.block_size_at(path)
        return (
            None if out % size == inner % size == 0 else f"blocks of {size} do not divide its sizes, {out} and {inner}"
        )

    def rewrite(self, site: Site) -> Tensor:
        (out, inner), size = delta.sizes(site), self.block_size_at(site.path)
        kernel = site.param("kernel", (out // size, inner // size, size), self._start(out, inner))
        return site.output + site.apply(convolve, site.input.to(kernel.dtype), kernel) / inner

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combining.linear_in_tensors(self, shares, how)

    def _start(self, out: int, inner: int) -> Any:
        if self.init == "gaussian":
            return nn.init.normal_
        bound = {"identity": 0.0, "kaiming_uniform": math.sqrt(1 / inner)}.get(self.init, math.sqrt(6 / (inner + out)))
        return lambda kernel: nn.init.uniform_(kernel, -bound, bound)


@in_single
def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """C x; block (m, n) of C has kernel[m, n, (j - i) mod b] in row i and column j."""
    size = kernel.shape[-1]
    if torch.compiler.is_exporting():
        at = torch.arange(size, device=kernel.device)
        blocks = kernel[:, :, (at - at.unsqueeze(-1)) % size]
        return F.linear(x, blocks.transpose(1, 2).reshape(blocks.shape[0] * size, -1))
    x = x.unflatten(-1, (-1, size))
    spectrum = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x), torch.fft.fft(kernel))
    return torch.fft.fft(spectrum).real.flatten(-2)
