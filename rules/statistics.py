"""Running statistics of normalisation layers while adapters train: the adapter's own, or frozen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from surgery import LiveSite, Rule, Site, Targets, rule
from surgery.rules.bias import EVERYWHERE
from surgery.rules.train import merged_all

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


@rule("statistics")
class StatisticsRule(Rule):
    """Keep running statistics with the adapter, or freeze them; without targets, on all layers that track statistics.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import LoraRule, StatisticsRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> model = apply_rules(model, [LoraRule("0", rank=2), StatisticsRule()])
    >>> [name for name, _ in model[1].adapters.default.named_buffers()]
    ['running_mean', 'running_var', 'num_batches_tracked']

    Training moves the running mean and variance of a BatchNorm (or of an InstanceNorm that tracks them) with the
    adapter's activations. Without this rule the base's statistics move, and `remove` restores them. With it, the
    adapter has copies, which are saved, loaded, switched and merged with it. The rule trains nothing.

    Args:
        targets: layers; default all that track statistics.
        frozen: training normalises by the base's statistics, as evaluation does, and moves none; default False.

    Raises:
        PlanError: a module does not track statistics, or, with `frozen`, has a forward of its own.
    """

    targets: Targets = field(default=EVERYWHERE, kw_only=False)
    frozen: bool = False
    identity = True
    routable = False

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        chosen = self.targets != (EVERYWHERE,) or _tracked(module)
        return [(path, module)] if chosen else []

    def check(self, module: nn.Module, path: str) -> str | None:
        if not _tracked(module):
            return "it tracks no running statistics"
        base = getattr(module, "_surgery_base", type(module))
        if self.frozen and base.forward not in (nn.BatchNorm1d.forward, nn.InstanceNorm1d.forward):
            return "its forward is not torch's own, so what it does with its statistics is not known"
        return None

    def rewrite(self, site: Site) -> Tensor | None:
        names = _tracked(site.module)
        if not self.frozen:
            for name in names:
                site.replace(site.tensor(name), site.buffer(name, site.module.get_buffer(name)))
            return None
        weights = [site.tensor(name) if getattr(site.module, name) is not None else None for name in ("weight", "bias")]
        mean, var = (site.tensor(name) for name in names[:2])
        output = site.apply(_by_statistics, site.this, site.input, mean, var, *weights)
        for name in names:
            site.replace(site.tensor(name), site.tensor(name).clone())  # what moves is thrown away
        return output

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        return merged_all(site)


def _tracked(module: nn.Module) -> list[str]:
    tracks = isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats
    return [name for name in _NAMES if tracks and module._buffers.get(name) is not None]


def _by_statistics(
    module: nn.Module, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The layer's computation in evaluation mode."""
    eps: float = module.eps  # type: ignore[assignment]
    if isinstance(module, _BatchNorm):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    batched = x.dim() == module._get_no_batch_dim() + 1  # type: ignore[operator]
    output = F.instance_norm(x if batched else x.unsqueeze(0), mean, var, weight, bias, False, 0.0, eps)
    return output if batched else output.squeeze(0)
