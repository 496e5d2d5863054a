"""Another module's computation instead of a module's own: a GELU for a ReLU, an RMSNorm for a LayerNorm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import LiveSite, Site, SiteError, SiteModule, TraceError, class_of, rule
from surgery.rules._shared.arguments import Arguments, arguments_for, why_called_otherwise
from surgery.rules._shared.module_maker import ModuleMaker, cast_like


@rule("replace")
class ReplaceRule(ModuleMaker):
    """Replaces a module's output by the output of another module.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import ReplaceRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> _ = apply_rules(model, [ReplaceRule(nn.ReLU, by="torch.nn.LeakyReLU", kwargs={"negative_slope": 0.5})])
    >>> model[1](torch.tensor([-1.0, 1.0])), type(model[1]).__name__
    (tensor([-0.5000,  1.0000]), 'ReLU')

    The other module's tensors belong to the adapter, with `_` for a dot in their names, and have the dtype of LoRA's.
    The other module receives the site's first argument first. Further arguments go to parameters of the same name, or
    by position to parameters without a default. Arguments without a matching parameter are not passed. The rule can't
    be merged.

    Args:
        by: qualified name of an nn.Module class or of a function that returns a module, or the class or the function.
            Or a module, whose tensors are copied; or a class or function that has no importable name: such a rule can't
            be saved.
        kwargs: plain data, the arguments of the class or the function; default None.
        inherit: tensors start as the site's tensors of the same name and shape; default False.
        trainable: whether the parameters train; default None: each keeps its `requires_grad`.
        opaque: default None: record the other module's operations where its forward is straight-line code, and
            otherwise call the module itself at run time (branches, loops, several outputs, buffers that it writes).
            True: always call the module. False: never; a `TraceError` names the line that can't be recorded.
        inputs: parameter of the other module → argument of the site (None: the parameter's default); default None.

    Raises:
        RuleError: a field is out of range, or `kwargs` do not fit the class or the function.
        SiteError: an argument is ambiguous, or a needed one is missing.
        TraceError: with `opaque=False`, a line that can't be recorded. Always: a forward that sets attributes on its
            module, which would be lost. (Register buffers instead.)
    """

    by: str | type[nn.Module] | nn.Module | Callable[..., nn.Module] | None = None
    kwargs: Mapping[str, Any] | None = None
    inherit: bool = False
    trainable: bool | None = None
    opaque: bool | None = None
    inputs: Mapping[str, str | None] | None = None

    exclusive = imports = True
    why_not_merged = "it puts another computation in the module's place, which its weights can't hold"

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.inputs, (Mapping, type(None))):
            raise self.bad("inputs", "a mapping")

    def alike(self, path: str) -> Any:
        return None if self.inherit else ()

    def committed(self, site: LiveSite) -> nn.Module:
        other = site.submodule("", self.source)
        why = why_called_otherwise(class_of(site.module), type(other), self.inputs)
        if why is not None:
            raise SiteError(
                f"a {type(other).__name__} can't stand in the place of this {class_of(site.module).__name__}",
                where=site.path,
                why=why,
                fix="give its forward the parameters of the other one, in the same order",
            )
        return other

    def rewrite(self, site: Site) -> Tensor | None:
        base = {**dict(site.module.named_parameters()), **dict(site.module.named_buffers())}
        other = site.submodule("", self.source, trainable=self.trainable, inherit=base if self.inherit else None)
        arguments = arguments_for(site, other.kind, self.inputs, self.label)
        if self.opaque is False or (self.opaque is None and other.straight and arguments.exact):
            try:
                return _inlined(site, other, arguments)
            except TraceError:
                if self.opaque is False:
                    raise
        floating = (name for name, tensor in base.items() if tensor.is_floating_point())
        like = next((site.tensor(name) for name in floating), None)
        return other.called(arguments.positional, arguments.named, arguments.more, arguments.extra, like)


def _inlined(site: Site, other: SiteModule, arguments: Arguments) -> Any:
    x = site.input
    like = other.floating
    args, kwargs = arguments.positional, arguments.named
    if like is not None:
        args = tuple([site.apply(cast_like, value, like) for value in args])
        kwargs = {name: site.apply(cast_like, value, like) for name, value in kwargs.items()}
    output = other.inlined(*args, **kwargs)
    # Cast here, an output needs nothing of the module's own, which is then not run.
    if isinstance(site.module, nn.Embedding):
        return output
    return tree_map(lambda leaf: leaf.to(x.dtype) if hasattr(leaf, "to") else leaf, output)
