"""`ModelEdits`: what the author of a structural rule changes a model with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from surgery.errors import SiteError
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.head_exchange import exchange_head
from surgery.model_edits.layer_order import is_layer_list, reorder_layers
from surgery.model_edits.vocabulary import resize_vocabulary
from surgery.model_edits.weight_ties import tie_parameters, untie_parameters
from surgery.patterns.wrappers import submodule

__all__ = ["ModelEdits"]


class ModelEdits(EditLog):
    """The edits of one structural rule on a model. `remove` undoes them to the bit.

    >>> from torch import nn
    >>> from surgery import StructureRule, apply_rules, rule
    >>> @rule("doc-first-two")
    ... class FirstTwoRule(StructureRule):
    ...     def restructure(self, edits, matched):
    ...         for path, _ in matched:
    ...             edits.reorder(path, [0, 1])
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    >>> len(apply_rules(model, [FirstTwoRule("re:0")])[0])
    2

    Attributes:
        model: the model, as the edits so far have left it.
        warnings: texts that `apply_rules` warns with.
        unplain: why no plain class can hold the edited model, as texts; empty if one can.
        steps: for a plan's table: (path, class name, what changes there). `reorder` adds its own.
    """

    def layers(self, path: str) -> list[str]:
        """Return the names of the layers in a list of layers.

        Raises:
            SiteError: the module at the path is not a ModuleList or a Sequential.
        """
        container = submodule(self.model, path)
        if is_layer_list(container):
            return list(container._modules)
        raise SiteError(
            "this is not a list of layers",
            where=path or "(the model itself)",
            why=f"it is a {type(container).__name__}, whose forward names its children",
            fix="name a ModuleList or a Sequential, or a layer in one; ReplaceRule(…, by='torch.nn.Identity') takes "
            "the computation of any module out",
        )

    def reorder(self, path: str | Sequence[str], order: Sequence[int], *, share_weights: bool = False) -> None:
        """Put the layers of a list into another order, as if the model had been built so.

        Args:
            path: the path of the list, or the paths of several lists of one length. Lists whose length is one field of
                the configuration (attentions and feed-forwards in XLM) must change in one call.
            order: for each new layer, the index of the present layer. A layer that occurs again is copied, and a layer
                that does not occur is taken out.
            share_weights: whether copies have the weights of the original layer. Default False.

        Raises:
            SiteError: it is not a list of layers, an index is beyond its layers, none would be left, other lists must
                change with it, or tensors depend on a layer's position.
        """
        paths = [path] if isinstance(path, str) else list(path)
        for each in paths:
            count = len(self.layers(each))
            beyond = sorted({index for index in order if not 0 <= index < count})
            if beyond:
                raise SiteError(
                    f"there is no layer {', '.join(map(str, beyond))}",
                    where=each or "(the model itself)",
                    why=f"it has {count} layers, with indices from 0 to {count - 1}",
                    fix="correct the order",
                )
            if not order:
                raise SiteError("no layer would be left", where=each, fix="keep one layer or more")
        reorder_layers(self, paths, order, share_weights=share_weights)

    def exchange_head(self, paths: Sequence[str], labels: int | Sequence[str], *, trainable: bool = True) -> None:
        """Exchange the head of the model for one with other labels, as if the model had been built so.

        Args:
            paths: the paths of the last linear layers; empty: those whose size follows from the configuration.
            labels: the number of labels, or their names.
            trainable: whether the new layers train with the adapter. Default True.

        Raises:
            SiteError: there is no head, or a path does not lead to a Linear.
        """
        exchange_head(self, paths, labels, trainable=trainable)

    def resize_vocabulary(
        self,
        paths: Sequence[str],
        tokens: int | None,
        *,
        multiple: int | None = None,
        start: str | Tensor | Mapping[str, Tensor] = "mean",
        sources: Sequence[int | Sequence[int]] = (),
    ) -> None:
        """Change the number of tokens, as if the model had been built so. Adapters on the resized modules follow.

        Args:
            paths: the paths of the embedding and of an untied head; empty: the model's own, with all that depends on
                the size of the vocabulary.
            tokens: the new number; None: the present one.
            multiple: the number is rounded up to a multiple of this. Default None.
            start: "mean", "zeros", "normal" or "copy"; or a tensor of new rows, or such by path. Default "mean".
            sources: for "copy", for each new row the rows whose mean it starts as.

        Raises:
            SiteError: the configuration uses a token that would go, or the rows do not fit.
        """
        resize_vocabulary(self, paths, tokens, multiple=multiple, start=start, sources=sources)

    def tie(self, paths: Sequence[str], parameter: str = "weight", to: str | None = None) -> None:
        """Put one parameter in the place of others, and declare the tie to transformers.

        Args:
            paths: the paths of the modules whose parameter goes; empty: the output head.
            parameter: its name. Default "weight".
            to: the path of the parameter that takes the place; None: the weight of the input embedding.

        Raises:
            SiteError: the parameters differ in shape or dtype, or are one already.
        """
        tie_parameters(self, paths, parameter, to)

    def untie(self, paths: Sequence[str], parameter: str | None = None, *, trainable: bool = False) -> None:
        """Give modules parameters of their own in the place of shared ones. Files of the adapter have them.

        Args:
            paths: the paths of the modules; empty: the output head.
            parameter: the name of the parameter; None: all that they share with other modules.
            trainable: whether the new parameters train with the adapter. Default False.

        Raises:
            SiteError: a module does not share a parameter.
        """
        untie_parameters(self, paths, parameter, trainable=trainable)
