"""FourierFT: ΔW is the inverse Fourier transform of a few trained frequencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SurgeryError, rule
from surgery.rules._linear import delta as _delta
from surgery.rules._shared import combining, complex_weights, fields, path_patterns
from surgery.rules._shared.solving import in_single


@rule("fourier")
class FourierRule(Rule):
    """y = W x + scaling · real(ifft2(S)) x: S (out, in) is zero except for `n_frequency` trained entries.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import FourierRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(32, 16)), [FourierRule("0", n_frequency=20)])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'spectrum': (20,), 'index': (20,)}

    Works on Linear, transformers' Conv1D and quantised Linears (unmerged). `spectrum` (n_frequency) is trained. `index`
    (n_frequency) holds the entries' places, row · in + column, drawn as PEFT draws them. The tensors are float32, or
    float64 on a float64 module, as the transform needs it.

    Args:
        n_frequency: number of trained entries; default 1000.
        scaling: factor of the change; default 150.
        random_loc_seed: seed that draws the places; default 777.
        init: "random" (default; normal, PEFT's init_weights=False) or "identity" (True: zero).
        n_frequency_pattern: path suffix or regular expression → n_frequency there; default None.

    Raises:
        RuleError: a field is out of range. More frequencies than the weight has entries are a problem of the plan.

    Source: Gao et al. 2024, arXiv:2405.03003; PEFT's FourierFTConfig, whose field names and defaults these are.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init: Literal["random", "identity"] = "random"
    n_frequency_pattern: Mapping[str, int] | None = None

    linear = True

    def validate(self) -> None:
        fields.whole(self, "n_frequency")
        fields.whole_patterns(self, "n_frequency_pattern")
        fields.whole(self, "random_loc_seed", least=0)
        fields.numbers(self, "scaling")
        fields.one_of(self, "init", "random", "identity")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def n_frequency_at(self, path: str) -> int:
        return path_patterns.first(self.n_frequency_pattern, path, self.n_frequency)

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        return fields.unused_patterns(self, paths, "n_frequency_pattern")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "it takes the real part of a Fourier transform"):
            return why
        return _delta.why_no_map(module) or _delta.more_than_weight(module, self.n_frequency_at(path))

    def rewrite(self, site: Site) -> Tensor:
        (out, inner), count = _delta.sizes(site), self.n_frequency_at(site.path)
        start = 0.0 if self.init == "identity" else nn.init.normal_
        spectrum = site.param("spectrum", (count,), start)
        index = site.buffer("index", torch.zeros((), dtype=torch.long).expand(count))  # drawn at last
        S = spectrum.new_zeros(out * inner).index_copy(0, index, spectrum).view(out, inner)
        delta = site.apply(inverse_transform, S) * self.scaling
        return site.output + F.linear(site.input.to(delta.dtype), delta)

    def initialise(self, site: LiveSite) -> None:
        (out, inner), count = _delta.sizes(site), self.n_frequency_at(site.path)
        draw = torch.Generator().manual_seed(self.random_loc_seed)
        site.params["index"].copy_(torch.randperm(out * inner, generator=draw)[:count])

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combining.linear_in_tensors(self, shares, how)


@in_single
def inverse_transform(S: Tensor) -> Tensor:
    """The real part of the inverse Fourier transform."""
    return torch.fft.ifft2(S).real
