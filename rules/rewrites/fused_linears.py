"""Linears of the same input become one Linear: queries, keys and values; gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import RuleError, module_of
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.rewrite import RewriteRule

__all__ = ["are_plain", "fuse_linears", "fused_pair", "fused_triple", "held_pair", "held_triple", "pair", "triple"]


def fuse_linears(targets: Any = (), *, count: int = 3, held: bool = False, **fields: Any) -> RewriteRule:
    """Linears of the same input become one `F.linear`, whose result is split: q, k and v; gate and up.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import fuse_linears
    >>> sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    >>> model, ids = LlamaModel(LlamaConfig(**sizes)).eval(), torch.randint(0, 50, (2, 6))
    >>> before = model(ids)[0]
    >>> rules = [fuse_linears("self_attn"), fuse_linears("mlp", count=2)]
    >>> _ = apply_rules(model, rules, example_inputs=ids)
    >>> torch.allclose(model(ids)[0], before, atol=1e-5)
    True

    The modules and their parameters stay, so training, checkpoints and `remove` are as without the rule. By default the
    weights are concatenated at each call. That is a copy of the weights: it pays where many tokens share it. With
    `held`, the adapter has a copy of the concatenated weights. Then each call is one product, and later changes of the
    base's weights, such as a merge, have no effect until the rule is applied again, and the base's weights get no
    gradients.

    The result has the bits of the separate products where the BLAS computes each output feature alike for all sizes of
    the matrix. Else its last bits differ.

    A Linear with hooks or with another adapter stays as it is. The Linears are layers of one module, so those of
    several decoder layers that read the encoder's output stay apart. `across_modules=True` joins them.

    Args:
        targets: Where the rule goes; default: everywhere.
        count: How many Linears are fused: 2 or 3. Default 3.
        held: Whether the adapter has a copy of the concatenated weights. Default False.
        **fields: Further fields of `RewriteRule`.
    """
    if count not in (2, 3):
        raise RuleError("fuse_linears fuses 2 or 3 Linears", why=f"count is {count!r}", fix="apply it several times")
    pattern = pair if count == 2 else triple
    replacements = (held_pair, held_triple) if held else (fused_pair, fused_triple)
    # The copy passes no gradient on to the base. Keys and values of several layers may have one input: not across them.
    fields = {"where": are_plain, "equivalent": not held, "across_modules": False, **fields}
    return RewriteRule(targets, pattern=pattern, replacement=replacements[count - 2], **fields)


def pair(x: Any, a: Any = module_of(nn.Linear), b: Any = module_of(nn.Linear)) -> Any:
    return a(x), b(x)


def triple(x: Any, a: Any = module_of(nn.Linear), b: Any = module_of(nn.Linear), c: Any = module_of(nn.Linear)) -> Any:
    return a(x), b(x), c(x)


def are_plain(match: RewriteMatch) -> bool:
    """Whether the modules are different Linears of one dtype, without hooks and without other adapters."""
    modules = [match[name].module for name in ("a", "b", "c") if name in match]
    plain = all(type(module) is nn.Linear and not module._forward_hooks for module in modules)
    plain = plain and not any(module._forward_pre_hooks or module._backward_hooks for module in modules)
    return plain and len({id(m) for m in modules}) == len(modules) and len({m.weight.dtype for m in modules}) == 1


def fused_pair(x: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
    return _fused(x, [a, b])


def fused_triple(x: Tensor, a: Any, b: Any, c: Any) -> Sequence[Tensor]:
    return _fused(x, [a, b, c])


def held_pair(x: Tensor, a: Any, b: Any, site: Any) -> Sequence[Tensor]:
    return _held(x, [a, b], site)


def held_triple(x: Tensor, a: Any, b: Any, c: Any, site: Any) -> Sequence[Tensor]:
    return _held(x, [a, b, c], site)


def _fused(x: Tensor, linears: list[Any]) -> Sequence[Tensor]:
    weight = torch.cat([linear.weight for linear in linears])
    biases = [_bias(linear) for linear in linears]
    bias = None if all(linear.bias is None for linear in linears) else torch.cat(biases)
    return _parts(F.linear(x, weight, bias), [linear.out_features for linear in linears])


def _bias(linear: Any) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _held(x: Tensor, linears: list[Any], site: Any) -> Sequence[Tensor]:
    modules = [linear.module for linear in linears]
    sizes = [module.out_features for module in modules]
    shape = sum(sizes), modules[0].in_features
    dtype = modules[0].weight.dtype
    weight = site.buffer("weight", shape, _concatenated(modules, "weight"), dtype=dtype)
    bias = None
    if any(module.bias is not None for module in modules):
        bias = site.buffer("bias", shape[:1], _concatenated(modules, "bias"), dtype=dtype)
    return _parts(F.linear(x, weight, bias), sizes)


def _parts(y: Tensor, sizes: list[int]) -> list[Tensor]:
    """Returns the parts as single views: a forward may write in place to these, and not to those of `split`."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [y.narrow(-1, start, size) for start, size in zip(starts, sizes, strict=True)]


def _concatenated(modules: list[nn.Linear], name: str) -> Callable[[Tensor], Any]:
    def start(tensor: Tensor) -> None:
        parts = [m.weight if name == "weight" else m.bias for m in modules]
        zeros = [m.weight.new_zeros(m.out_features) for m in modules]
        tensor.copy_(torch.cat([z if p is None else p.detach() for p, z in zip(parts, zeros, strict=True)]))

    return start
