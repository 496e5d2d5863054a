"""AdaLoRA's training: the loss that keeps its vectors orthogonal, and the allocation of ranks to sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery import RuleError, rules_of
from surgery.rules.adalora import AdaLoraRule


def orthogonal_loss(model: nn.Module, adapter: str = "default") -> Tensor:
    """Return AdaLoRA's regularisation, to be added to the training loss.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import AdaLoraRule, orthogonal_loss
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [AdaLoraRule("0", rank=4)])
    >>> orthogonal_loss(model).requires_grad
    True

    Args:
        model: a model with an adapter that has one AdaLoraRule.
        adapter: the adapter's name; default "default".

    Returns:
        A scalar tensor: `orth_reg_weight` times the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over the rule's sites.

    Raises:
        RuleError: the adapter does not have exactly one AdaLoraRule.

    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's AdaLoraConfig.orth_reg_weight.
    """
    rule, sites = _rule_and_sites(model, adapter)
    squares = [
        square
        for tensors in sites.values()
        for A, B in [(tensors["A"].flatten(1), tensors["B"].flatten(1))]
        for square in (A @ A.t(), B.t() @ B)
    ]
    norms = [torch.linalg.matrix_norm(s - torch.eye(len(s), dtype=s.dtype, device=s.device)) for s in squares]
    return rule.orth_reg_weight * sum(norms) / len(norms)  # type: ignore[return-value]


class RankAllocator:
    """Reduces the mean rank of an AdaLoRA adapter from `rank` to `target_r` by setting entries of E to zero.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import AdaLoraRule, RankAllocator
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [AdaLoraRule("0", rank=4, target_r=2, total_step=9)])
    >>> allocator = RankAllocator(model)
    >>> for step in range(1, 10):
    ...     model(torch.randn(3, 8)).square().sum().backward()
    ...     allocator.update_and_allocate(step)
    >>> int((allocator.kept["0"]).sum())
    2

    Call `update_and_allocate(step)` after `backward` and the optimizer's step, and before gradients are set to zero.
    Steps count from 1. The schedule is PEFT's: nothing changes for `tinit` steps. Then, every `deltaT` steps, the
    entries of least importance beyond the budget become zero. From `total_step - tfinal` on, the remaining entries
    stay.

    Args:
        model: a model with an adapter that has one AdaLoraRule.
        adapter: the adapter's name; default "default".

    Attributes:
        kept: which entries of E remain: site path → boolean tensor (rank).

    Raises:
        RuleError: the adapter does not have exactly one AdaLoraRule, or that rule has no `total_step`.

    Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's AdaLoraModel.update_and_allocate.
    """

    def __init__(self, model: nn.Module, adapter: str = "default"):
        self.rule, self.sites = _rule_and_sites(model, adapter)
        if self.rule.total_step is None:
            raise RuleError("AdaLoraRule has no total_step", why="the ranks are shared out over the training's steps")
        self.first = len(self.sites) * self.rule.rank
        self.target = len(self.sites) * self.rule.target_r
        self.kept: dict[str, Tensor] = {}
        self._means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # of importance and of its uncertainty

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Record the gradients' importance at this step, and set entries of E to zero as the schedule says."""
        rule = self.rule
        last = int(rule.total_step or 0) - rule.tfinal
        if step < last:
            self._update()
        if step == last or (rule.tinit < step < last and step % rule.deltaT == 0):
            rest = 1 - (step - rule.tinit) / (last - rule.tinit)
            self._allocate(int((self.first - self.target) * rest**3 + self.target))
        elif step > last:
            self._mask()

    def _update(self) -> None:
        for path, tensors in self.sites.items():
            for name, tensor in tensors.items():
                if tensor.grad is None:
                    raise RuleError(f"{path}: {name} has no gradient", fix="call this between backward and zero_grad")
                now = (tensor * tensor.grad).abs()
                zero = torch.zeros_like(now)
                importance, uncertainty = self._means.get((path, name), (zero, zero))
                importance = self.rule.beta1 * importance + (1 - self.rule.beta1) * now
                uncertainty = self.rule.beta2 * uncertainty + (1 - self.rule.beta2) * (now - importance).abs()
                self._means[path, name] = importance, uncertainty

    def _allocate(self, budget: int) -> None:
        scores = torch.cat([self._score(path).cpu() for path in self.sites])
        # Of equal ones the first are kept: PEFT's threshold drops them all, even more than the budget asks for.
        kept = torch.zeros(self.first, dtype=torch.bool).index_fill(
            0, scores.topk(min(budget, self.first)).indices, True
        )
        self.kept = dict(zip(self.sites, kept.split(self.rule.rank), strict=True))
        self._mask()

    def _score(self, path: str) -> Tensor:
        A, E, B = (torch.mul(*self._means[path, name]) for name in "AEB")
        return E.view(-1) + A.flatten(1).mean(1) + B.flatten(1).mean(0)

    def _mask(self) -> None:
        for path, kept in self.kept.items():
            self.sites[path]["E"].masked_fill_(~kept.unsqueeze(-1).to(self.sites[path]["E"].device), 0.0)


def _rule_and_sites(model: nn.Module, adapter: str) -> tuple[AdaLoraRule, dict[str, dict[str, nn.Parameter]]]:
    rules = [rule for rule in rules_of(model, adapter) if isinstance(rule, AdaLoraRule)]
    if len(rules) != 1:
        raise RuleError(f"the adapter {adapter!r} has {len(rules)} AdaLoraRules, not one")
    parameters = dict(model.named_parameters())
    ends = f"adapters.{adapter}.E"
    places = [name.removesuffix("E") for name in parameters if f".{name}".endswith(f".{ends}")]
    prefixes = {place.removesuffix(f"adapters.{adapter}.").rstrip("."): place for place in places}
    return rules[0], {path: {name: parameters[place + name] for name in "AEB"} for path, place in prefixes.items()}
