"""LoRA on stacks of expert matrices: one low-rank change per expert."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, LowRank, Rule, Share, Site, SurgeryError, packed_stacks_of, rule
from surgery.rules._linear.factored import factored
from surgery.rules._low_rank import swapping
from surgery.rules._shared import combining, fields, path_patterns


@rule("expert-lora")
class ExpertLoraRule(Rule):
    """W_e + (alpha / rank) · B_e A_e for every expert e of a parameter (experts, out, in).

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import ExpertLoraRule
    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.randn(4, 16, 8))
    ...     def forward(self, x, expert):
    ...         return nn.functional.linear(x, self.up[expert])
    >>> model = apply_rules(nn.Sequential(Experts()), [ExpertLoraRule("0", rank=2)])
    >>> tuple(model[0].adapters.default.up_A.shape), tuple(model[0].adapters.default.up_B.shape)
    ((4, 2, 8), (4, 16, 2))

    Works on modules that own three-dimensional parameters, such as the experts of Mixtral, Qwen-MoE and GPT-OSS in
    transformers, and on matrices (out, in) that `parameters` names. Where the module's code picks experts and
    multiplies, ΔW is never computed: the product is W's plus A's and B's, for the experts and tokens in question.

    Tensors: `<parameter>_A` (experts, rank, in) and `<parameter>_B` (experts, out, rank). PEFT's lora_A is A as
    (experts · rank, in); its lora_B is (out, rank · experts) with the experts innermost,
    `B.permute(1, 2, 0).flatten(1)`.

    Args:
        parameters: names of the module's parameters; default (): all with three dimensions. PEFT: the ends of
            target_parameters.
        rank: rows of each A_e; default 8. PEFT: r.
        alpha: numerator of the scale; default 8. PEFT: lora_alpha.
        rslora: scale by alpha / sqrt(rank); default False. PEFT: use_rslora.
        init: "kaiming" (default; PEFT's init_lora_weights=True), "gaussian" or "random" (False: B is not zero).
        rank_pattern: suffix or regular expression of `path.parameter` → rank there; default None.
        alpha_pattern: suffix or regular expression of `path.parameter` → alpha there; default None.
        transposed: whether the parameter is (experts, in, out); default None: the module's `is_transposed`, as in PEFT.
        dtype: dtype of the tensors. Default None: the module's dtype, or float32 if that is half precision.

    Raises:
        RuleError: a field is out of range.

    Source: Hu et al. 2021, arXiv:2106.09685; PEFT's LoraConfig.target_parameters.
    """

    parameters: Sequence[str] = ()
    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "random"] = "kaiming"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    transposed: bool | None = None
    dtype: torch.dtype | str | None = None

    def validate(self) -> None:
        if isinstance(self.parameters, str) or not all(isinstance(name, str) for name in self.parameters):
            raise self.bad("parameters", "a list of names")
        fields.patterns(self, "rank_pattern", "alpha_pattern")
        if not all(type(rank) is int and rank >= 1 for rank in (self.rank, *(self.rank_pattern or {}).values())):
            raise self.bad("rank_pattern" if self.rank_pattern else "rank", "a whole number from 1")
        fields.positive(self, "alpha")
        if not all(type(a) in (int, float) and 0 < a < math.inf for a in (self.alpha_pattern or {}).values()):
            raise self.bad("alpha_pattern", "a mapping to numbers above 0")
        fields.flag(self, "rslora")
        fields.one_of(self, "init", "kaiming", "gaussian", "random")
        if self.transposed is not None:
            fields.flag(self, "transposed")
        if self.dtype not in (None, "float16", "bfloat16", "float32", "float64"):
            raise self.bad("dtype", "a floating-point dtype")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init != "random"

    def check(self, module: nn.Module, path: str) -> str | None:
        parameters, stacks = module._parameters, packed_stacks_of(module)
        if not self.names(module):
            return "it owns no parameter of three dimensions (experts, out, in)"
        for name in self.names(module):
            if name in stacks:
                continue
            parameter = parameters.get(name)
            if parameter is None:
                return f"it owns no parameter {name!r}; it has {', '.join(parameters) or 'none'}"
            if type(parameter) is not nn.Parameter or not parameter.dtype.itemsize > 1:
                return f"its {name} is a {type(parameter).__name__} of {parameter.dtype}, which is packed"
            matrix = parameter.dim() == 2 and "bias" not in name
            if parameter.dim() != 3 and not matrix:
                return f"its {name} is {tuple(parameter.shape)}: a stack of experts is (experts, out, in)"
        return None

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        if self.parameters:
            changed = [_parameter_path(path, name) for path in paths for name in self.parameters]
            yield from fields.unused_patterns(self, changed, "rank_pattern", "alpha_pattern")

    def rank_at(self, path: str) -> int:
        """The rank of a parameter; `path` is `path.parameter`."""
        return int(path_patterns.first(self.rank_pattern, path, self.rank))

    def matrices(self, module: nn.Module, path: str) -> Mapping[str, tuple[int, int]]:
        """The matrix size of one expert, for every changed parameter."""
        shapes = {name: shape_of(module, name)[-2:] for name in self.names(module)}
        return {_parameter_path(path, name): (out, inner) for name, (out, inner) in shapes.items()}

    def names(self, module: nn.Module) -> list[str]:
        """The names of a module's parameters that the rule changes."""
        stacks = packed_stacks_of(module)
        stored = {name for stack in stacks.values() for name in stack.tensors()} - stacks.keys()  # such as scales
        parameters = {name: parameter for name, parameter in module._parameters.items() if name not in stored}
        plain = [name for name, parameter in parameters.items() if parameter is not None and parameter.dim() == 3]
        return list(self.parameters) or list(dict.fromkeys([*(s for s in stacks if s not in parameters), *plain]))

    def rewrite(self, site: Site) -> None:
        for name, (*experts, out, inner), rank, scale in self._sizes(site):
            A = site.param(f"{name}_A", (*experts, rank, inner), _fill_of(self.init, rank), dtype=self.dtype)
            fill = _fill_of("kaiming", rank) if self.init == "random" else 0.0
            B = site.param(f"{name}_B", (*experts, out, rank), fill, dtype=self.dtype)
            left, right = (A.mT, B.mT) if self._turned(site.module) else (B, A)
            changed = site.apply(factored, site.tensor(name), left, right, scale)
            site.replace(site.tensor(name), changed)

    def merged(self, site: LiveSite) -> dict[str, LowRank]:
        changes = {}
        for name, (*experts, _, _), _, scale in self._sizes(site):
            A, B = site.params[f"{name}_A"].detach(), site.params[f"{name}_B"].detach()
            left, right = (A.mT, B.mT) if self._turned(site.module) else (B, A)
            changes[name] = LowRank(left.flatten(0, -2), right.flatten(0, -2), scale, groups=math.prod(experts))
        return changes

    def swapped(self, live: Rule, site: LiveSite) -> dict[str, Tensor]:
        assert isinstance(live, ExpertLoraRule)
        adjustable = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "dtype", "parameters", "transposed")
        swapping.check(self, live, *adjustable)
        results, scales = dict(site.params), {name: scale for name, _, _, scale in self._sizes(site)}
        if not scales.keys() <= set(live.names(site.module)) or self._turned(site.module) != live._turned(site.module):
            swapping.check(self, live, *adjustable[:-2])
        for name, (*experts, out, inner), rank, scale in live._sizes(site):
            A, B = f"{name}_A", f"{name}_B"
            if name in scales:
                results[B] = swapping.scale(results[B], scales[name] / scale, site)
            else:  # of fewer parameters: at the others it does nothing
                like = next(iter(site.params.values()))
                results |= {A: like.new_zeros(*experts, rank, inner), B: like.new_zeros(*experts, out, rank)}
        return results

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        """Combines each parameter that any of the adapters changes, as LoRA does."""
        if how.untouched(shares):
            return self, shares[0].params
        how.agree(shares, "parameters", "rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "dtype")
        most = combining.largest_rank(how)
        results, ranks = dict[str, Tensor](), dict[str, int]()
        sizes = [{size[0]: size[2:] for size in cast(ExpertLoraRule, s.rule)._sizes(s.site)} for s in shares]
        for name in dict.fromkeys(name for sizes_of_share in sizes for name in sizes_of_share):
            members = [
                (share, *sizes_of_share[name])
                for share, sizes_of_share in zip(shares, sizes, strict=True)
                if name in sizes_of_share
            ]
            some, held_ranks, scales = zip(*members, strict=True)
            ranks[name] = rank = combining.rank_of(how, some, held_ranks, most)
            ups, downs = ([share.params[f"{name}_{which}"].detach() for share in some] for which in "BA")
            results[f"{name}_B"], results[f"{name}_A"] = combining.factors(how, some, scales, ups, downs, rank)
        rank = max(ranks.values())
        others = {name: r for name, r in ranks.items() if r != rank}
        full = {f"^{re.escape(_parameter_path(shares[0].site.path, name))}": r for name, r in others.items()} or None
        rules = [cast(ExpertLoraRule, share.rule) for share in shares]
        rule = self.replace(
            parameters=self.parameters if len({rule.parameters for rule in rules}) == 1 else tuple(ranks),
            rank=rank,
            alpha=rank,
            rslora=False,
            rank_pattern=full,
            alpha_pattern=full,
            dtype=self.dtype if len({rule.dtype for rule in rules}) == 1 else None,
        )
        return rule, results

    def _sizes(self, site: Site | LiveSite) -> Iterable[tuple[str, tuple[int, ...], int, float]]:
        """Name, (experts, out, in) or (out, in), rank and scale of each parameter."""
        for name in self.names(site.module):
            *experts, out, inner = shape_of(site.module, name)
            path = _parameter_path(site.path, name)
            rank = self.rank_at(path)
            alpha = path_patterns.first(self.alpha_pattern, path, self.alpha)
            size = (*experts, inner, out) if self._turned(site.module) else (*experts, out, inner)
            yield name, size, rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def _turned(self, module: nn.Module) -> bool:
        if self.transposed is not None:
            return self.transposed
        stack = next(iter(packed_stacks_of(module).values()), None)
        return bool(getattr(module, "is_transposed", False)) if stack is None else stack.transposed


def shape_of(module: nn.Module, name: str) -> tuple[int, ...]:
    """The sizes of a module's parameter; of a packed stack, those of the dequantised one."""
    stack = packed_stacks_of(module).get(name)
    return tuple(module._parameters[name].shape) if stack is None else stack.shape  # type: ignore[union-attr]


def _parameter_path(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter


def _fill_of(init: str, rank: int) -> Callable[[Tensor], Any]:
    """Returns the function that fills a stack in place, each expert as LoRA's A."""
    if init == "gaussian":
        return lambda stack: nn.init.normal_(stack, std=1 / rank)
    return lambda stack: nn.init.kaiming_uniform_(stack.flatten(0, -2), a=math.sqrt(5))
