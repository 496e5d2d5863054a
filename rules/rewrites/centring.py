"""LayerNorm becomes RMSNorm where the layers before it can return features whose mean is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import ModelEdits, SiteError, StructureRule, rule
from surgery.errors import abbreviate
from surgery.rules.rewrites._chains import find_chains, has_hooks
from surgery.rules.rewrites._residual import Streams, features_dim, find_streams, is_writer

__all__ = ["CentreNormRule", "centre_layer_norm"]

_LAYERS = (nn.Linear, nn.Embedding)


@rule("centre-norm")
class CentreNormRule(StructureRule):
    """Puts an RMSNorm in the place of each LayerNorm, and centres the features of the layers before it.

    `centre_layer_norm` finds them. Each Linear, Conv1D or Embedding gets another weight and another bias: the old ones
    minus their means over the output features, computed in float64. Its outputs then have a mean of zero, which a
    LayerNorm would subtract. The `nn.RMSNorm` has a copy of the LayerNorm's weight. The bias of the LayerNorm goes into
    the biases of the layers that read it. `remove` puts the old tensors and the norms back.

    Args:
        norms: The path of each layer → the path of the LayerNorm after it. The targets are the layers. Nothing but the
            norm may use what the layer returns. For layers that write to one residual stream: the path of each layer →
            a list of the norms after it and before the next layer. Only LayerNorms may read the stream.
        readers: The path of each norm whose bias is not zero → the layers that alone read its result. Default None.

    Raises:
        RuleError: `norms` or `readers` is not a mapping of paths.
        SiteError: The norm's bias is not zero and it has no readers, the modules do not fit together, or a layer of a
            residual stream is excluded.

    Note:
        Outputs and the gradients of inputs are those of the LayerNorm. Training differs, because a step may give the
        layers' outputs a mean again, and an RMSNorm keeps it; a dropout of the stream does so, too. The same holds for
        adapters on the layers. An embedding that was tied to a head has its own weight afterwards.

    Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.2.
    """

    norms: Mapping[str, str | Sequence[str]] | None = None
    readers: Mapping[str, Sequence[str]] | None = None

    finds_targets = True

    def validate(self) -> None:
        norms, readers = self.norms, self.readers or {}
        if not isinstance(norms, Mapping) or not all(map(_are_paths, (norms, *map(_listed, norms.values())))):
            raise self.bad("norms", "the path of each layer → the path of its norm; centre_layer_norm finds them")
        if not isinstance(readers, Mapping) or not all(map(_are_paths, (readers, *readers.values()))):
            raise self.bad("readers", "the path of each norm → a list of the layers that read it")
        if not self.targets:
            object.__setattr__(self, "targets", tuple(norms))

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        norms, left = self.norms or {}, dict(matched).keys()
        absent = [path for path, value in norms.items() if not isinstance(value, str) and path not in left]
        if absent and any(not isinstance(norms.get(path), str) for path in left):
            what = f"{absent[0]} is excluded, and it writes to the same residual stream"
            raise SiteError("not all layers of the stream can be centred", where=matched[0][0], why=what,
                            fix="exclude none of its layers, or all")  # fmt: skip
        pairs = []
        for path, module in matched:
            if path not in norms:
                raise SiteError("no norm is named for this layer", where=path, fix="add it to norms")
            pairs.append((path, module, _listed(norms[path])))
        for path, layer, norm_paths in pairs:
            for norm_path in norm_paths or [None]:
                norm = None if norm_path is None else edits.model.get_submodule(norm_path)
                readers = (self.readers or {}).get(norm_path or "", ())
                is_stream = not isinstance(norms[path], str)
                if (why := _reason_against(edits.model, layer, norm, bool(readers), is_stream)) is not None:
                    what = f"{norm_path} can't become an RMSNorm" if norm_path else "the layer can't be centred"
                    raise SiteError(what, where=path, why=why, fix="exclude this layer")
                if norm_path is not None and norm is not None:
                    _fold_bias(edits, norm_path, norm, readers)
        for path, module, norm_paths in pairs:
            layer: Any = module
            if isinstance(module, nn.Embedding) and _is_shared(edits.model, module.weight):
                _untie(edits)
            edits.set_parameter(layer, "weight", _centred(layer.weight, features_dim(layer)))
            if getattr(layer, "bias", None) is not None:
                edits.set_parameter(layer, "bias", _centred(layer.bias, 0))
            for norm_path in norm_paths:
                norm: Any = edits.model.get_submodule(norm_path)
                edits.set_module(norm_path, _rms_norm(norm))
                edits.unplain.append(f"{norm_path} is an RMSNorm")
            names = abbreviate(norm_paths, "norms") if norm_paths else "of the same stream"
            edits.steps.append((path, type(layer).__name__, f"centred, for the RMSNorm {names}"))


def centre_layer_norm(model: nn.Module, example_inputs: Any) -> CentreNormRule:
    """Find each LayerNorm behind layers that can be centred, and return the rule that centres these.

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

    A norm may follow one Linear or Embedding directly. Or it reads a residual stream, the sum of embeddings and of the
    last layers of attentions and MLPs, as in GPT-2, OPT and GPT-NeoX. Then all layers that write to the stream are
    centred, if only LayerNorms read it. In BERT, Linears read the stream, and so its norms stay.

    A layer is left out if something else uses its output or its tensors, if it is called more than once, or if it has
    hooks. A LayerNorm with a bias stays unless only Linears read it, because an `nn.RMSNorm` does not have a bias.

    Args:
        model: The model.
        example_inputs: Inputs of one call, as for `apply_rules`.

    Raises:
        SiteError: There is no such norm. The reason tells what stands in the way.
    """
    norms: dict[str, Any] = {}
    readers: dict[str, list[str]] = {}
    reasons = list[str]()
    for chain in find_chains(model, example_inputs, _LAYERS, (nn.LayerNorm,)):
        layer, norm = model.get_submodule(chain.first), model.get_submodule(chain.second)
        why = _reason_against(model, layer, norm, False, False)
        if why is None:
            norms[chain.first] = chain.second
        else:
            reasons.append(f"{chain.second}: {why}")
    streams = find_streams(model, example_inputs)
    _add_streams(model, streams, norms, readers, reasons)
    if not norms:
        reasons += [f"{path}: {why}" for path, why in streams.reasons.items()]
        more = f" (and {len(reasons) - 1} more norms)" if len(reasons) > 1 else ""
        if not reasons:
            fix = "see graph_of(model, example_inputs)"
            raise SiteError("no LayerNorm follows a Linear or an Embedding that nothing else uses", fix=fix)
        raise SiteError("no LayerNorm can become an RMSNorm", why=reasons[0] + more)
    return CentreNormRule(tuple(norms), norms=norms, readers=readers or None)


def _add_streams(
    model: nn.Module, streams: Streams, norms: dict[str, Any], readers: dict[str, list[str]], reasons: list[str]
) -> None:
    """Add the layers of residual streams, each with the norms after it."""
    taken = set(norms.values())
    for path, layers in streams.norms.items():
        norm: Any = model.get_submodule(path)
        if path in taken or any(isinstance(norms.get(layer), str) for layer in layers):
            continue
        biased = norm.bias is not None and bool(norm.bias.detach().any())
        own = streams.readers[path] if biased else None
        whys = [_reason_against(model, model.get_submodule(layer), norm, bool(own), True) for layer in layers]
        if (why := next(filter(None, whys), None)) is not None:
            reasons.append(f"{path}: {why}")
            continue
        for layer in layers:
            norms.setdefault(layer, [])
        norms[layers[-1]].append(path)
        readers |= {path: own} if own else {}


def _reason_against(model: nn.Module, layer: Any, norm: Any, has_readers: bool, in_stream: bool) -> str | None:
    fits = type(layer) in _LAYERS or in_stream and is_writer(layer) and not hasattr(type(layer), "_surgery_base")
    if not fits or norm is not None and type(norm) is not nn.LayerNorm:
        kinds = f"a {type(layer).__name__} and a {type(norm).__name__}"
        return f"they are {kinds}, and not a plain Linear or Embedding and a LayerNorm"
    features = layer.weight.shape[features_dim(layer)]
    if norm is not None and tuple(norm.normalized_shape) != (features,):
        return f"the norm is over {tuple(norm.normalized_shape)}, and the layer returns {features} features"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "the embedding limits the norm of its rows (max_norm)"
    modules = [layer] if norm is None else [layer, norm]
    if any(map(has_hooks, modules)):
        return "one of them has hooks"
    own = [p for module in modules for p in module._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter or p.is_meta or not p.is_floating_point() for p in own):
        return "a parameter is not an ordinary tensor of floating-point numbers"
    tied = own[1:] if in_stream and isinstance(layer, nn.Embedding) else own  # the embedding gets its own weight
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if any(p is tensor for tensor in tied)]
    if len(names) > len(tied):
        return f"tensors of the two are shared: {', '.join(names)}"
    if norm is not None and norm.bias is not None and bool(norm.bias.detach().any()) and not has_readers:
        return "the bias of the LayerNorm is not zero, and an RMSNorm does not have a bias"
    return None


def _fold_bias(edits: ModelEdits, path: str, norm: Any, readers: Sequence[str]) -> None:
    """Add what the norm's bias becomes in the layers that read the norm to their biases."""
    for reader_path in readers:
        reader: Any = edits.model.get_submodule(reader_path)
        if isinstance(reader, nn.Embedding) or not is_writer(reader) or hasattr(type(reader), "_surgery_base"):
            what = f"{reader_path} is a {type(reader).__name__}, and not a plain Linear"
            raise SiteError(f"the bias of {path} can't be folded", where=reader_path, why=what, fix="correct readers")
        weight = reader.weight.detach().to("cpu", torch.float64)
        share = norm.bias.detach().to("cpu", torch.float64) @ (weight if features_dim(reader) else weight.T)
        share = share if reader.bias is None else share + reader.bias.detach().to("cpu", torch.float64)
        bias = nn.Parameter(share.to(reader.weight.device, reader.weight.dtype), reader.weight.requires_grad)
        edits.set_parameter(reader, "bias", bias)
        edits.steps.append((reader_path, type(reader).__name__, f"its bias has that of {path}"))


def _is_shared(model: nn.Module, parameter: Tensor) -> bool:
    return sum(p is parameter for module in model.modules() for p in module._parameters.values()) > 1


def _untie(edits: ModelEdits) -> None:
    """Note in the configuration that the head has another weight than the embedding."""
    model: Any = edits.model
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        edits.change_config(model, {"tie_word_embeddings": False})


def _are_paths(paths: Any) -> bool:
    return not isinstance(paths, str) and all(isinstance(path, str) for path in paths)


def _listed(paths: str | Sequence[str]) -> Sequence[str]:
    return (paths,) if isinstance(paths, str) else paths


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
