"""Full training of a module, per adapter; the original is kept. PEFT's modules_to_save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from rules import _combined
from surgery import Combination, LiveSite, Rule, Share, Site, rule

R = TypeVar("R", bound=Rule)


@rule("train")
class TrainRule(Rule):
    """Train all of a module's parameters, in copies that belong to the adapter.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from rules import TrainRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [TrainRule("1")])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.adapters.default.weight', '1.adapters.default.bias']

    A target with children (a classification head of several layers) stands for all modules in it that own
    parameters. Buffers that are saved with the module, such as BatchNorm's running statistics, are the adapter's
    own, too. dtypes and shapes are the base's. Source: PEFT's LoraConfig.modules_to_save.
    """

    identity = True
    exclusive = True

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return owners_of_tensors(module, path)

    def check(self, module: nn.Module, path: str) -> str | None:
        return None if dict(own_tensors(module)) else "it owns no parameters"

    def rewrite(self, site: Site) -> None:
        replace_all(site)

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        return merged_all(site)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, _combined.Tensors]:
        return combined_all(self, shares, how)


def owners_of_tensors(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside that own parameters, each where its own forward is the one that runs."""
    found = False
    for name, inner in _walk(module, path):
        if any(parameter is not None for parameter in inner._parameters.values()):
            found = True
            yield name, inner
    if not found:
        yield path, module  # refused by check, with the reason


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    if not isinstance(module, nn.MultiheadAttention):  # runs its out_proj's parameters in its own forward
        for name, child in module.named_children():
            if name != "adapters":
                yield from _walk(child, f"{path}.{name}" if path else name)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and saved buffers by name; with MultiheadAttention's, those of its out_proj."""
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    transient = module._non_persistent_buffers_set
    yield from ((n, tensor) for n, tensor in module._buffers.items() if tensor is not None and n not in transient)
    if isinstance(module, nn.MultiheadAttention):
        yield from ((f"out_proj.{name}", tensor) for name, tensor in module.out_proj.named_parameters(recurse=False))


def replace_all(site: Site, only: Iterable[str] | None = None) -> None:
    """Put the adapter's own copy in the place of each of the module's tensors (or of those named)."""
    parameters = dict(site.module.named_parameters())
    for name, tensor in own_tensors(site.module):
        if only is None or name in only:
            make = site.param if name in parameters else site.buffer
            site.replace(site.tensor(name), make(name.replace(".", "_"), tensor))


def merged_all(site: LiveSite) -> dict[str, Tensor]:
    """The adapter's copies as the module's own tensors."""
    by_name = {name.replace(".", "_"): (name, tensor) for name, tensor in own_tensors(site.module)}
    return {
        by_name[key][0]: tensor.detach().to(by_name[key][1].dtype)
        for key, tensor in site.params.items()
        if key in by_name
    }


def combined_all(rule: R, shares: Sequence[Share], how: Combination) -> tuple[R, _combined.Tensors]:
    """The adapters' copies as one: W + Σ w (T − W)."""
    base = {name.replace(".", "_"): tensor for name, tensor in own_tensors(shares[0].site.module)}
    return _combined.moved(base, rule, shares, how)
