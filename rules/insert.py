"""Another module behind a module, or before it: a normalisation, a dropout, a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from surgery import Site, SiteModule, TraceError, rule
from surgery.rules._shared import fields
from surgery.rules._shared.module_maker import ModuleMaker, cast_like


@rule("insert")
class InsertRule(ModuleMaker):
    """Puts another module behind a module, or before it.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import InsertRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> _ = apply_rules(model, [InsertRule("0", by="torch.nn.LayerNorm", kwargs={"normalized_shape": 4})])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.named_parameters()}
    {'weight': (4,), 'bias': (4,)}

    Behind a module, the other module gets the hidden state: the output, or the first tensor of a tuple, a mapping or a
    ModelOutput. The other items of the output stay. Before a module, it gets the first input. The other module's
    tensors belong to the adapter, with `_` for a dot in their names, and have the dtype of LoRA's. The result has the
    dtype of the hidden state. The rule can't be merged.

    Args:
        by: qualified name of an nn.Module class or of a function that returns a module, or the class or the function.
            Or a module, whose tensors are copied: such a rule can't be saved.
        kwargs: plain data, the arguments of the class or the function; default None.
        placement: "after" (default) or "before".
        trainable: whether the parameters train; default None: each keeps its `requires_grad`.
        opaque: as in ReplaceRule; default None.

    Raises:
        RuleError: a field is out of range, or `kwargs` do not fit the class.
        TraceError: with `opaque=False`, a line that can't be recorded.
    """

    by: str | type[nn.Module] | nn.Module | Callable[..., nn.Module] | None = None
    kwargs: Mapping[str, Any] | None = None
    placement: Literal["after", "before"] = "after"
    trainable: bool | None = None
    opaque: bool | None = None

    imports = True
    why_not_merged = "it adds a computation beside the module's, which its weights can't hold"

    def validate(self) -> None:
        super().validate()
        fields.one_of(self, "placement", "after", "before")

    def alike(self, path: str) -> Any:
        return ()

    def rewrite(self, site: Site) -> Tensor | None:
        other = site.submodule("", self.source, trainable=self.trainable)
        if self.placement == "after":
            return site.with_hidden(self._call(site, other, site.hidden))
        site.replace(site.input, self._call(site, other, site.input))
        return None

    def _call(self, site: Site, other: SiteModule, x: Tensor) -> Tensor:
        """The other module's output, in the dtype of its input."""
        if self.opaque is False or (self.opaque is None and other.straight):
            try:
                like = other.floating
                output = other.inlined(x if like is None else site.apply(cast_like, x, like))
                return site.apply(cast_like, output, x)
            except TraceError:
                if self.opaque is False:
                    raise
        return other.called((x,), {})
