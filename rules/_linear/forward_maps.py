"""How a module's own forward uses its weight: the plain map, a scaled map, or another function.

torch's own forward is the plain map. A user's forward is run on small inputs (`surgery.rules._linear.weight_flow`).
If this does not prove its form, rules edit the weight itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from surgery import packed_weight_of
from surgery.rules._linear.signatures import PLAIN, adds_to_supers, takes_one_input
from surgery.rules._linear.weight_flow import Form, prove_form, tensors_of


def torchs_own(module: nn.Module) -> bool:
    """Whether the code of torch or of transformers' Conv1D runs, without overridden methods."""
    for cls in getattr(type(module), "_surgery_base", type(module)).__mro__:
        if cls in PLAIN or f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D":
            return True
        if any(name in vars(cls) for name in ("forward", "_conv_forward", "__getattr__", "weight", "bias")):
            return False
    return False


def packed(module: nn.Module) -> bool:
    """Whether the weight is packed: in buffers, as a tensor subclass, or in a dtype that the forward unpacks."""
    if packed_weight_of(module) is not None:
        return True
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return True
    numbers = weight.is_floating_point() or weight.is_complex()
    return not (numbers and weight.element_size() > 1) and not torchs_own(module)


def why_unreadable(module: nn.Module, what: str) -> str | None:
    """Returns why a rule can't read or edit a packed weight: its layout is not known. `what` the rule does with it."""
    if not packed(module) or packed_weight_of(module) is not None:
        return None
    if not isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return None  # its weights have other names, such as those of MultiheadAttention
    kind = type(module._parameters.get("weight")).__name__
    return f"{what}, and the weight is packed in a layout that is not known ({kind})"


def why_not_packed(module: nn.Module) -> str | None:
    """Returns why a module with a packed weight is not the plain map: a user's forward does more than its base class.

    The own forward of a quantised layer is its library's, and counts as the plain map.
    """
    for cls in _base(module).__mro__:
        if cls in PLAIN:
            break
        if "forward" in vars(cls):
            weight = module._parameters.get("weight")
            kind = "in packed buffers" if weight is None else f"a {type(weight).__name__}"
            more = adds_to_supers(vars(cls)["forward"])
            return f"its forward does more than its base class's, and its weight is {kind}" if more else None
    return None


def form_of(module: nn.Module, weight: Tensor, samples: Callable[[], Sequence[Tensor]]) -> Form:
    """Returns "plain" for W x + b, "scaled" for c · (W g(x) + b) with a number c, "other" if neither is sure.

    `weight`: a small weight for the run; `samples`: inputs of all shapes that the module may take.
    """
    key = _settings(module)
    forms = _forms.setdefault(_base(module), {})
    if key is None or key not in forms:
        alone = not module._modules.keys() - {"adapters"}  # a child may record its inputs
        form = prove_form(module, weight, samples()) if alone and takes_one_input(_base(module)) else "other"
        if key is None:
            return form
        forms[key] = form
    return forms[key]


_forms: weakref.WeakKeyDictionary[type, dict[tuple, Form]] = weakref.WeakKeyDictionary()


def _base(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_surgery_base", type(module))


def _settings(module: nn.Module) -> tuple | None:
    """Returns everything that the form may depend on, or None if it can't be compared."""
    excluded = {*nn.Module().__dict__, "_surgery"}
    attributes = {k: v for k, v in module.__dict__.items() if k not in excluded and not k.startswith("_surgery")}
    if not all(isinstance(value, (int, float, str, bytes, tuple, type(None))) for value in attributes.values()):
        return None
    tensors = [(name, None if t is None else (t.dtype, t.numel() == 1)) for name, t in tensors_of(module)]
    key = (*((name, type(value), value) for name, value in attributes.items()), *tensors)
    try:
        hash(key)
    except TypeError:
        return None
    return key
