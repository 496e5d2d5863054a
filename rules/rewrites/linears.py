"""Two Linears in a row become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery import ModelEdits, SiteError, StructureRule, rule
from surgery.rules.rewrites._chains import find_chains

__all__ = ["JoinLinearsRule", "join_linears"]


@rule("join-linears")
class JoinLinearsRule(StructureRule):
    """Puts one Linear in the place of two that follow one another without anything between them.

    `join_linears` finds the pairs. The second module becomes a Linear with the weight W₂ W₁ and the bias W₂ b₁ + b₂,
    computed in float64. An `nn.Identity` takes the place of the first. `remove` puts both back.

    Args:
        linears: The path of each first Linear → the path of the second. The targets are the first ones.

    Raises:
        RuleError: `linears` is not a mapping of paths.
        SiteError: A module is not a Linear, or the sizes do not fit.
    """

    linears: Mapping[str, str] | None = None

    finds_targets = True

    def validate(self) -> None:
        pairs = self.linears
        if not isinstance(pairs, Mapping) or not all(isinstance(path, str) for pair in pairs.items() for path in pair):
            raise self.bad("linears", "the path of each first Linear → that of the second; join_linears finds them")
        if not self.targets:
            object.__setattr__(self, "targets", tuple(pairs))

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        order = list(self.linears or {})
        for path, _ in sorted(matched, key=lambda pair: order.index(pair[0]) if pair[0] in order else -1):
            second_path = (self.linears or {}).get(path)
            if second_path is None:
                raise SiteError("no second Linear is named for this one", where=path, fix="add it to linears")
            first: Any = edits.model.get_submodule(path)
            second: Any = edits.model.get_submodule(second_path)
            if type(first) is not nn.Linear or type(second) is not nn.Linear:
                kinds = f"{type(first).__name__} and {type(second).__name__}"
                raise SiteError(f"{path} and {second_path} can't be joined", where=path, why=f"they are {kinds}")
            if first.out_features != second.in_features:
                why = f"the first returns {first.out_features} features, and the second takes {second.in_features}"
                raise SiteError(f"{path} and {second_path} can't be joined", where=path, why=why)
            edits.set_module(second_path, _joined(first, second))
            edits.set_module(path, nn.Identity())
            edits.steps.append((second_path, "Linear", f"with {path} in it"))


def join_linears(model: nn.Module, example_inputs: Any, *, larger: bool = False) -> JoinLinearsRule:
    """Find each pair of Linears in a row, and return the rule that joins them.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import join_linears
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    >>> before = model(x)
    >>> apply_rules(model, join_linears(model, x))
    Sequential(
      (0): Identity()
      (1): Linear(in_features=4, out_features=3, bias=True)
    )
    >>> torch.allclose(model(x), before, atol=1e-6)
    True

    Args:
        model: The model.
        example_inputs: Inputs of one call, as for `apply_rules`.
        larger: Whether pairs are joined whose one weight has more numbers than the two, such as a low-rank pair.
            Default False.

    Raises:
        SiteError: There is no such pair.
    """
    pairs: dict[str, str] = {}
    sizes: dict[str, int] = {}  # the input size of what stands at a path by now
    for chain in find_chains(model, example_inputs, (nn.Linear,), (nn.Linear,)):
        first: Any = model.get_submodule(chain.first)
        second: Any = model.get_submodule(chain.second)
        inner, outer = sizes.get(chain.first) or int(first.in_features), second.out_features
        if larger or inner * outer <= (inner + outer) * first.out_features:
            pairs[chain.first] = chain.second
            sizes[chain.second] = inner
    if not pairs:
        raise SiteError("no Linear follows another one directly", fix="see graph_of(model, example_inputs)")
    return JoinLinearsRule(tuple(pairs), linears=pairs)


def _joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        weight = second.weight.double() @ first.weight.double()
        bias = None if second.bias is None else second.bias.double()
        if first.bias is not None:
            inner = second.weight.double() @ first.bias.double()
            bias = inner if bias is None else bias + inner
        joined = nn.Linear(first.in_features, second.out_features, bias is not None, device="meta")
        trained = bool(second.weight.requires_grad)
        joined.weight = nn.Parameter(weight.to(second.weight.dtype), trained)
        if bias is not None:
            joined.bias = nn.Parameter(bias.to(second.weight.dtype), trained)
    return joined.train(second.training)
