"""BatchNorm folded into the convolution or the Linear before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from surgery import ModelEdits, SiteError, StructureRule, rule
from surgery.rules.rewrites._chains import find_chains

__all__ = ["FoldNormRule", "fold_batch_norm"]

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@rule("fold-norm")
class FoldNormRule(StructureRule):
    """Folds each BatchNorm into the layer before it: a convolution or a Linear. For evaluation.

    `fold_batch_norm` finds the pairs. The layer gets another weight and a bias, and an `nn.Identity` takes the place of
    the norm. `remove` puts the old tensors and the norms back.

    Args:
        norms: The path of each layer → the path of the norm after it. The targets are the layers.

    Raises:
        RuleError: `norms` is not a mapping of paths.
        SiteError: A norm is in training mode or has no running statistics, or the two modules do not fit together.

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3.2.
    """

    norms: Mapping[str, str] | None = None

    finds_targets = True

    def validate(self) -> None:
        norms = self.norms
        if not isinstance(norms, Mapping) or not all(isinstance(path, str) for pair in norms.items() for path in pair):
            raise self.bad("norms", "the path of each layer → the path of its norm; fold_batch_norm finds them")
        if not self.targets:
            object.__setattr__(self, "targets", tuple(norms))

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        for path, layer in matched:
            norm_path = (self.norms or {}).get(path)
            if norm_path is None:
                raise SiteError("no norm is named for this layer", where=path, fix="add it to norms")
            norm: Any = edits.model.get_submodule(norm_path)
            why = _reason_against(layer, norm)
            if why is not None:
                raise SiteError(f"{norm_path} can't be folded into this {type(layer).__name__}", where=path, why=why)
            weight, bias = _folded(layer, norm)
            edits.set_parameter(layer, "weight", nn.Parameter(weight, _trains(layer)))
            edits.set_parameter(layer, "bias", nn.Parameter(bias, _trains(layer)))
            edits.set_module(norm_path, nn.Identity())
            edits.steps.append((path, type(layer).__name__, f"with {norm_path} folded in"))


def fold_batch_norm(model: nn.Module, example_inputs: Any) -> FoldNormRule:
    """Find each BatchNorm that follows a convolution or a Linear directly, and return the rule that folds them.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules.rewrites import fold_batch_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> x = torch.randn(2, 3, 8, 8)
    >>> before = model(x)
    >>> rule = fold_batch_norm(model, x)
    >>> rule.norms
    {'0': '1'}
    >>> folded = apply_rules(model, rule)
    >>> torch.allclose(folded(x), before, atol=1e-6), type(folded[1]).__name__
    (True, 'Identity')
    >>> torch.equal(remove(model)(x), before)
    True

    A layer is left out if something else uses its output, if it is called more than once, or if its tensors are shared.

    Args:
        model: The model, in evaluation.
        example_inputs: Inputs of one call, as for `apply_rules`.

    Raises:
        SiteError: There is no such pair, or the model is in training mode.
    """
    if model.training:
        raise SiteError("BatchNorms can't be folded in training", why="they change with each batch", fix="model.eval()")
    pairs = {}
    for chain in find_chains(model, example_inputs, tuple(_CONVOLUTIONS), tuple(set(_CONVOLUTIONS.values()))):
        layer, norm = model.get_submodule(chain.first), model.get_submodule(chain.second)
        if isinstance(layer, nn.Linear) and (chain.shape is None or len(chain.shape) != 2):
            continue  # the norm's channels are not the Linear's features
        if _reason_against(layer, norm) is None:
            pairs[chain.first] = chain.second
    if not pairs:
        raise SiteError("no BatchNorm follows a convolution or a Linear", fix="see graph_of(model, example_inputs)")
    return FoldNormRule(tuple(pairs), norms=pairs)


def _reason_against(layer: nn.Module, norm: Any) -> str | None:
    kind = next((kind for kind in _CONVOLUTIONS if isinstance(layer, kind)), None)
    if kind is None or not isinstance(norm, _CONVOLUTIONS[kind]):
        return f"a {type(norm).__name__} does not normalise its channels"
    if norm.training or norm.running_mean is None:
        return "the norm is in training mode" if norm.training else "the norm has no running statistics"
    channels = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    if channels != norm.num_features:
        return f"the norm has {norm.num_features} channels, and the layer {channels}"
    if isinstance(layer, _TRANSPOSED) and layer.groups != 1:
        return "a transposed convolution has groups"
    return None


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            if norm.weight is None:
                statistics = (*statistics[:3], torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean))
            weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
        else:
            transpose = isinstance(layer, _TRANSPOSED)
            weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=transpose)
    return weight.detach().clone(), bias.detach().clone()


def _trains(layer: Any) -> bool:
    return bool(layer.weight.requires_grad)
