"""LayerNorm becomes RMSNorm where the layer before it can return features whose mean is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import ModelEdits, SiteError, StructureRule, rule
from surgery.rules.rewrites._chains import find_chains, has_hooks

__all__ = ["CentreNormRule", "centre_layer_norm"]

_LAYERS = (nn.Linear, nn.Embedding)


@rule("centre-norm")
class CentreNormRule(StructureRule):
    """Puts an RMSNorm in the place of each LayerNorm, and centres the features of the layer before it.

    `centre_layer_norm` finds the pairs. The Linear or Embedding gets another weight and another bias: the old ones
    minus their means over the output features, computed in float64. Its outputs then have a mean of zero, which a
    LayerNorm would subtract. The `nn.RMSNorm` has a copy of the LayerNorm's weight. `remove` puts the old tensors and
    the norms back.

    Args:
        norms: The path of each layer → the path of the LayerNorm after it. The targets are the layers. Nothing but the
            norm may use what the layer returns.

    Raises:
        RuleError: `norms` is not a mapping of paths.
        SiteError: The norm's bias is not zero, or the two modules do not fit together.

    Note:
        Outputs and the gradients of inputs are those of the LayerNorm. Training differs, because a step may give the
        layer's outputs a mean again, and an RMSNorm keeps it. The same holds for adapters on the layer.

    Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.2.
    """

    norms: Mapping[str, str] | None = None

    finds_targets = True

    def validate(self) -> None:
        norms = self.norms
        if not isinstance(norms, Mapping) or not all(isinstance(path, str) for pair in norms.items() for path in pair):
            raise self.bad("norms", "the path of each layer → the path of its norm; centre_layer_norm finds them")
        if not self.targets:
            object.__setattr__(self, "targets", tuple(norms))

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        for path, module in matched:
            layer: Any = module
            norm_path = (self.norms or {}).get(path)
            if norm_path is None:
                raise SiteError("no norm is named for this layer", where=path, fix="add it to norms")
            norm: Any = edits.model.get_submodule(norm_path)
            why = _reason_against(edits.model, layer, norm)
            if why is not None:
                raise SiteError(f"{norm_path} can't become an RMSNorm", where=path, why=why, fix="exclude this layer")
            edits.set_parameter(layer, "weight", _centred(layer.weight, 0 if isinstance(layer, nn.Linear) else 1))
            if getattr(layer, "bias", None) is not None:
                edits.set_parameter(layer, "bias", _centred(layer.bias, 0))
            edits.set_module(norm_path, _rms_norm(norm))
            edits.steps.append((path, type(layer).__name__, f"centred, for the RMSNorm {norm_path}"))
            edits.unplain.append(f"{norm_path} is an RMSNorm")


def centre_layer_norm(model: nn.Module, example_inputs: Any) -> CentreNormRule:
    """Find each LayerNorm that follows a Linear or an Embedding directly, and return the rule that centres these.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules.rewrites import centre_layer_norm
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, bias=False)), torch.randn(2, 4)
    >>> before = model(x)
    >>> rule = centre_layer_norm(model, x)
    >>> rule.norms
    {'0': '1'}
    >>> centred = apply_rules(model, rule)
    >>> torch.allclose(centred(x), before, atol=1e-5), type(centred[1]).__name__
    (True, 'RMSNorm')
    >>> torch.equal(remove(model)(x), before)
    True

    A layer is left out if something else uses its output or its tensors, if it is called more than once, or if it has
    hooks. A LayerNorm stays if its bias is not zero, because an `nn.RMSNorm` does not have a bias.

    Args:
        model: The model.
        example_inputs: Inputs of one call, as for `apply_rules`.

    Raises:
        SiteError: There is no such pair.
    """
    pairs, reasons = dict[str, str](), list[str]()
    for chain in find_chains(model, example_inputs, _LAYERS, (nn.LayerNorm,)):
        layer, norm = model.get_submodule(chain.first), model.get_submodule(chain.second)
        why = _reason_against(model, layer, norm)
        if why is None:
            pairs[chain.first] = chain.second
        else:
            reasons.append(f"{chain.second}: {why}")
    if not pairs and reasons:
        more = f" (and {len(reasons) - 1} more norms)" if len(reasons) > 1 else ""
        raise SiteError("no LayerNorm can become an RMSNorm", why=reasons[0] + more)
    if not pairs:
        fix = "see graph_of(model, example_inputs)"
        raise SiteError("no LayerNorm follows a Linear or an Embedding that nothing else uses", fix=fix)
    return CentreNormRule(tuple(pairs), norms=pairs)


def _reason_against(model: nn.Module, layer: Any, norm: Any) -> str | None:
    if type(layer) not in _LAYERS or type(norm) is not nn.LayerNorm:
        kinds = f"a {type(layer).__name__} and a {type(norm).__name__}"
        return f"they are {kinds}, and not a plain Linear or Embedding and a LayerNorm"
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.embedding_dim
    if tuple(norm.normalized_shape) != (features,):
        return f"the norm is over {tuple(norm.normalized_shape)}, and the layer returns {features} features"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "the embedding limits the norm of its rows (max_norm)"
    if has_hooks(layer) or has_hooks(norm):
        return "one of them has hooks"
    own = [p for module in (layer, norm) for p in module._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter or p.is_meta or not p.is_floating_point() for p in own):
        return "a parameter is not an ordinary tensor of floating-point numbers"
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if any(p is tensor for tensor in own)]
    if len(names) > len(own):
        return f"tensors of the two are shared: {', '.join(names)}"
    if norm.bias is not None and bool(norm.bias.detach().any()):
        return "the bias of the LayerNorm is not zero, and an RMSNorm does not have a bias"
    return None


def _centred(parameter: Tensor, features: int) -> nn.Parameter:
    """A parameter minus its mean over the dimension of the output features."""
    values = parameter.detach().to("cpu", torch.float64)
    centred = values - values.mean(features, keepdim=True)
    return nn.Parameter(centred.to(parameter.device, parameter.dtype), parameter.requires_grad)


def _rms_norm(norm: nn.LayerNorm) -> nn.RMSNorm:
    new = nn.RMSNorm([*norm.normalized_shape], norm.eps, norm.weight is not None, device="meta")
    if norm.weight is not None:
        new.weight = nn.Parameter(norm.weight.detach().clone(), norm.weight.requires_grad)
    return new.train(norm.training)
