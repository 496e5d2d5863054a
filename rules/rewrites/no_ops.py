"""Operations that return their input are taken out of a forward, and equal operations run once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from surgery import Rule, Site, Structure, TraceError, rule
from surgery.rules.rewrite import EVERYWHERE
from surgery.rules.rewrites._chains import has_hooks
from surgery.rules.rewrites._conditions import call_of, name_of_call

__all__ = ["NoOpsRule", "ShareRule"]

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT = Structure(lambda x: F.dropout(x))


class _GraphRule(Rule):
    """A rule that changes single operations of each forward, wherever its targets have one."""

    skips_calls = skips_sites = True
    why_not_merged = "it changes which operations run, and not a weight"

    def validate(self) -> None:
        if not self.targets:
            object.__setattr__(self, "targets", (EVERYWHERE,))

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        is_layer = type(module).__module__.startswith("torch.nn.") and not module._modules
        plain = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or is_layer
        return [] if plain or type(module).forward is nn.Module.forward else [(path, module)]

    def rewrite(self, site: Site) -> Tensor | None:
        if site.unreached and self.targets == (EVERYWHERE,):
            return NotImplemented
        try:
            site.find(_DROPOUT, leaves=False)  # so that the graph has the operations of functions from registries
            pairs = self.replacements(site, site.graph)
            replaced = {old: new for old, new in pairs if _is_tensor(old) and _is_tensor(new)}
        except TraceError:
            return NotImplemented
        for old, new in replaced.items():  # both are single tensors
            while new in replaced:
                new = replaced[new]
            site.replace(site.at(old), site.at(new))
        return None if replaced else NotImplemented

    def replacements(self, site: Site, graph: fx.Graph) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Returns pairs of nodes: the second has the value of the first, and comes before it."""
        raise NotImplementedError


@rule("no-ops")
class NoOpsRule(_GraphRule):
    """Takes operations out that return their input: dropout in evaluation or of rate 0, casts, and `nn.Identity`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import NoOpsRule
    >>> class Mlp(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)
    ...     def forward(self, x):
    ...         return self.drop(self.up(x.float()).relu())
    >>> model, x = Mlp().eval(), torch.randn(2, 4)
    >>> before = model(x)
    >>> _ = apply_rules(model, NoOpsRule(), example_inputs=x)
    >>> torch.equal(model(x), before)
    True

    The result has the same bits. The forward is written for each kind of call: in training, a dropout stays, and for
    inputs of another dtype, the cast does. A cast is taken out only where the dtypes of the arguments decide its
    dtype, and no parameter does. A layer of dropout follows the mode of the module around it. A layer with hooks stays.
    Casts with a device, `contiguous` and `clone` stay, because their results depend on more than the kind of call.

    `apply_rules` needs `example_inputs`.

    Args:
        targets: Where the rule goes; default: everywhere.
    """

    def replacements(self, site: Site, graph: fx.Graph) -> Iterable[tuple[fx.Node, fx.Node]]:
        decided: set[fx.Node] = set()  # nodes whose dtypes follow from those of the arguments
        for node in graph.nodes:
            sources = node.all_input_nodes
            source = next(iter(call_of(node)[0]), None)
            if node.op == "placeholder" or sources and node.op[:6] == "call_f" and decided.issuperset(sources):
                decided.add(node)
            elif sources and node.op == "call_method" and decided.issuperset(sources):
                decided.add(node)
            idle = _is_idle_layer(site, node) or _is_idle_dropout(node) or _is_idle_cast(node, decided)
            if idle and isinstance(source, fx.Node):
                yield node, source


@rule("share")
class ShareRule(_GraphRule):
    """Computes a value once that a forward computes twice: equal operations of equal operands.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules.rewrites import ShareRule
    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return x.exp().sin() + x.exp().cos()
    >>> model, x = Twice(), torch.randn(3)
    >>> before = model(x)
    >>> _ = apply_rules(model, ShareRule(), example_inputs=x)
    >>> torch.equal(model(x), before)
    True

    The result has the same bits. A gradient may differ in its last bits, because it is summed in another order.
    Functions of a fixed list are shared: arithmetic, elementwise functions, reductions, views, `cat` and `matmul`.
    Calls of modules, random functions and forwards that write in place stay.

    `apply_rules` needs `example_inputs`.

    Args:
        targets: Where the rule goes; default: everywhere.
    """

    def replacements(self, site: Site, graph: fx.Graph) -> Iterable[tuple[fx.Node, fx.Node]]:
        if any(_writes(node) for node in graph.nodes):
            return
        first: dict[Any, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if name_of_call(node) not in _PURE or any(user.op == "output" for user in node.users):
                continue
            key = _key(node, same)
            earlier = first.setdefault(key, node) if key is not None else node
            if earlier is not node:
                same[node] = earlier
                yield node, earlier


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("dtype"), torch.dtype)


def _is_idle_layer(site: Site, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module: Any = site.module.get_submodule(str(node.target))
    if type(module) not in (nn.Identity, *_LAYERS) or has_hooks(module):
        return False
    return type(module) is nn.Identity or module.p == 0 or not (site.training or module.training)


def _is_idle_dropout(node: fx.Node) -> bool:
    if "dropout" not in name_of_call(node):
        return False
    args, kwargs = call_of(node)
    given: Mapping[str, Any] = dict(zip(("p", "training"), args[1:], strict=False)) | kwargs
    training = given.get("training", given.get("train", True))
    return given.get("p", 0.5) == 0 or training is False


def _is_idle_cast(node: fx.Node, decided: set[fx.Node]) -> bool:
    name, (args, kwargs) = name_of_call(node), call_of(node)
    source = args[0] if args else None
    if not isinstance(source, fx.Node) or source not in decided:
        return False
    options = [*args[1:], *kwargs.values()]
    plain = name == "to" and len(options) == 1 and isinstance(options[0], torch.dtype)
    plain = plain or name in ("float", "half", "bfloat16", "double") and not options
    return plain and source.meta.get("dtype") is not None and source.meta.get("dtype") == node.meta.get("dtype")


def _writes(node: fx.Node) -> bool:
    name = name_of_call(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING or "out" in node.kwargs or node.kwargs.get("inplace") is True


def _key(node: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Any:
    """Returns what two equal operations have in common; None for an operation whose arguments can't be compared."""
    call = map_arg((node.args, node.kwargs), lambda argument: same.get(argument, argument))
    try:
        key = (node.op, node.target, _hashable(call))
        hash(key)
    except TypeError:
        return None
    return key


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(_hashable, value)
    if isinstance(value, dict):
        return "dict", *((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, slice):
        return "slice", _hashable(value.start), _hashable(value.stop), _hashable(value.step)
    return type(value), value  # 1, 1.0 and True are three arguments


_WRITING = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "iand", "ior", "setattr"})
_PURE = frozenset(
    "add sub mul truediv true_divide div neg pow matmul bmm exp log sin cos tan tanh sigmoid relu gelu silu softmax "
    "log_softmax rsqrt sqrt square abs erf reciprocal mean sum amax amin max min cumsum transpose permute view reshape "
    "unsqueeze squeeze expand flatten unflatten chunk split getitem getattr cat stack where masked_fill eq ne lt le gt "
    "ge floordiv mod to float type_as ones zeros arange tril triu full clamp minimum maximum einsum".split()
)
