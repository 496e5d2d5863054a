"""Derives ΔW of a rule with `linear = True`: runs its branch on the identity, and tests it on random inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Mergeable, Rule
from surgery.authoring.site_facts import SiteFacts
from surgery.complex_numbers import is_number
from surgery.errors import MergeError, qualified_name
from surgery.forward.parameter_view import call_own

__all__ = ["merged_tensors"]

_SLACK = 1e-4  # a rule may compute in float32; the error of a rule that is not linear is as large as its output


def merged_tensors(rule: Rule, site: LiveSite) -> Mapping[str, Change]:
    """The base's parameters with a rule folded in: from the rule's `merged`, or derived if the rule is linear."""
    if rule.linear and type(rule).merged is Mergeable.merged:
        return _derived(rule, site)
    return rule.merged(site)


def _derived(rule: Rule, site: LiveSite) -> dict[str, Tensor]:
    """The new weight of a Linear or Conv1D under a linear rule; `MergeError` for other modules or rules."""
    transposed = _is_transposed(site)
    weight = site.weight.detach()
    inner, out = weight.shape if transposed else weight.t().shape
    double = torch.float64 if weight.device.type != "mps" else torch.float32
    double = double.to_complex() if weight.is_complex() else double
    draw = torch.Generator().manual_seed(0)

    def contribution(x: Tensor, output: Tensor) -> Tensor:
        trial: Any = _Trial(rule, site, x, output)
        return rule.rewrite(trial) - output  # type: ignore[operator]

    def random(size: int) -> Tensor:
        kind = torch.complex64 if double.is_complex else torch.float32
        return (torch.randn(3, size, generator=draw, dtype=kind) * 10).to(weight.device, double)

    identity = torch.eye(inner, dtype=double, device=weight.device)
    delta = contribution(identity, identity.new_zeros(inner, out)).to(double)
    x, output = random(inner), random(out)
    expected = x @ delta
    # A change that is not finite can't be compared: a safe merge says so.
    for sample_output in (torch.zeros_like(output), output) if delta.isfinite().all() else ():
        off = (contribution(x, sample_output) - expected).abs().max()
        if not off <= _SLACK * (expected.abs().max() + sample_output.abs().max() * 1e-3):
            raise MergeError(
                f"{rule.label} says linear = True, and it is not linear",
                where=site.path,
                why=f"on a random input its contribution differs by {off:.3g} from that of its ΔW",
                fix="remove linear = True from the rule, or write its `merged`",
            )
    return {"weight": weight.to(double) + (delta if transposed else delta.t())}


def _is_transposed(site: LiveSite) -> bool:
    """Whether the weight is stored transposed: (in, out)."""
    base = site.base_class
    if base.forward is nn.Linear.forward:
        return False
    for cls in base.__mro__:
        if qualified_name(cls) == "transformers.pytorch_utils.Conv1D" and base.forward is cls.forward:
            return True
    raise MergeError(
        f"ΔW can't be derived on a {base.__name__}",
        where=site.path,
        why="ΔW is derived only for plain linear maps: Linear and transformers' Conv1D",
        fix="keep the adapter unmerged, or write the rule's `merged`",
    )


class _Trial(SiteFacts):
    """A site for a rewrite, with tensors instead of recorded values."""

    training = False

    def __init__(self, rule: Rule, live: LiveSite, x: Tensor, output: Tensor):
        super().__init__(live.module, live.path, live.adapter)
        self.rule, self.live = rule, live
        self.input, self.output = x, output
        self.base_output = self.hidden = output

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        return {list(inspect.signature(self.base_class.forward).parameters)[1]: self.input}

    @property
    def weight(self) -> Tensor:
        return self.tensor("weight")

    @property
    def bias(self) -> Tensor:
        return self.tensor("bias")

    def tensor(self, name: str) -> Tensor:
        if self.rule.additive:
            raise self._refused(f"it reads the base's {name}", "set additive = False: then all adapters merge together")
        return self._exact(self.live.base(name))

    def param(self, name: str, *_: Any, **__: Any) -> Tensor:
        return self._exact(self.live.params[name])

    buffer = param

    def call(self, input: Tensor, **tensors: Tensor | None) -> Tensor:
        unchanged = [name for name in self.module._parameters if name not in tensors]
        return call_own(self.module, input, **tensors, **{name: self.tensor(name) for name in unchanged})

    def with_hidden(self, new: Tensor) -> Tensor:
        return new

    def apply(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def replace(self, old: Tensor, new: Any) -> None:
        raise self._refused("it replaces a value", "return site.output plus the contribution")

    def _exact(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.to(self.input.dtype) if is_number(tensor) else tensor

    def _refused(self, why: str, fix: str) -> MergeError:
        return MergeError(f"{self.rule.label} says linear = True, and it is not", where=self.path, why=why, fix=fix)
