"""What a merge does to an example's outputs, and the inputs of sites on an example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import MergeError
from surgery.tracing.example_call import call, examples_in

__all__ = ["ExampleOutputs", "run_examples"]


class ExampleOutputs:
    """The outputs of a model on examples.

    Attributes:
        outputs: the output of each example.
        products: XᵀX of the inputs X (calls × positions, in) that each watched module got, by its id.
    """

    def __init__(self, outputs: list[Any], products: dict[int, Tensor]):
        self.outputs, self.products = outputs, products

    def difference(self, other: ExampleOutputs) -> float | None:
        """‖other − self‖ / ‖self‖ over all floating-point outputs; None without any."""
        pairs = [
            (a.double(), b.double())
            for a, b in zip(_tensors(self.outputs), _tensors(other.outputs), strict=True)
            if a.is_floating_point() and a.shape == b.shape
        ]
        if not pairs:
            return None
        norm = math.hypot(*(float(a[a.isfinite()].norm()) for a, _ in pairs))
        off = math.hypot(*(float(torch.where(a == b, 0.0, b - a).norm()) for a, b in pairs))
        return off / norm if norm else off

    def kl(self, other: ExampleOutputs) -> float | None:
        """The mean KL divergence of the other's distributions from these; None if an output does not have logits."""
        pairs = [(_logits(a), _logits(b)) for a, b in zip(self.outputs, other.outputs, strict=True)]
        total, count = 0.0, 0
        for a, b in pairs:
            if a is None or b is None or not a.numel():
                return None
            p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
            divergence = torch.where(p.exp() == 0, 0.0, p.exp() * (p - q)).sum(-1)
            total, count = total + float(divergence.sum()), count + divergence.numel()
        return max(total / count, 0.0) if count else None


def run_examples(model: nn.Module, example_inputs: Any, watched: Iterable[nn.Module] = ()) -> ExampleOutputs:
    """Run examples in evaluation mode without gradients. The model is not changed."""
    products: dict[int, Tensor] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None and x.is_floating_point() and x.dim():
            rows = x.detach().float().reshape(-1, x.shape[-1])
            product = rows.t() @ rows
            known = products.get(id(module))
            products[id(module)] = product if known is None or known.shape != product.shape else known + product

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in watched]
    try:
        outputs = [call(model, example) for example in examples_in(example_inputs)]
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise MergeError("example_inputs is an empty list", fix="pass an example, or leave it out")
    return ExampleOutputs(outputs, products)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.is_floating_point() else None
