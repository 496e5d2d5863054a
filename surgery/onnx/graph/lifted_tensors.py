"""Tensors of adapters as inputs of the exported graph: lifted out of their modules, and passed to the forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.onnx.calls.example import ExampleCall, without_dataclasses
from surgery.onnx.calls.sliding_windows import with_plain_caches
from surgery.onnx.graph.low_rank_op import by_name, write_branches

__all__ = ["Lifted", "SLOTS", "add_named_inputs", "forward_with", "split_factors"]

SLOTS = "surgery_slots"  # the argument of the exported forward that holds the lifted tensors


@dataclass
class Lifted:
    """An adapter's tensor that becomes an input of the graph.

    `free`: the axis of any size, such as a rank; `factor`: probably used only as a factor of a low-rank branch.
    """

    name: str
    box: nn.Module
    key: str
    tensor: Tensor
    free: int | None = None
    factor: bool = False

    @classmethod
    def lift(cls, name: str, box: nn.Module, key: str, free: int | None = None, factor: bool = False) -> Lifted:
        """Removes a tensor from its module. Each call of the exported forward puts it back for its duration."""
        tensors: Any = box._parameters if key in box._parameters else box._buffers
        tensor = tensors.pop(key)
        box._buffers[key] = None  # so that the attribute exists
        return cls(name, box, key, tensor.detach(), free, factor)


@contextlib.contextmanager
def forward_with(model: nn.Module, example: ExampleCall, lifted: Sequence[Lifted]) -> Iterator[nn.Module]:
    """Gives the model a forward that takes the lifted tensors as an argument and puts them into their modules.

    The forward is set on the instance: a wrapper module would change the names in the graph.
    """
    own_forward = model.forward

    @functools.wraps(own_forward)
    def forward(**values: Any) -> Any:
        slot_tensors = values.pop(SLOTS, {})
        for tensor in lifted:
            tensor.box._buffers[tensor.key] = slot_tensors[tensor.name]
        try:
            return without_dataclasses(with_plain_caches(example.call(own_forward, values)))
        finally:
            for tensor in lifted:
                tensor.box._buffers[tensor.key] = None

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [*example.values, *([SLOTS] if lifted else [])]
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    exported = _shell(model) if isinstance(model, fx.GraphModule) else model
    exported.__dict__["forward"] = forward
    try:
        yield exported
    finally:
        exported.__dict__.pop("forward", None)


def _shell(model: nn.Module) -> nn.Module:
    """Returns a module with the same children and tensors: torch.export ignores the forward of a GraphModule."""
    shell = nn.Module()
    for name in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[name] = model.__dict__[name]
    return shell.eval()


def split_factors(
    model: nn.Module, example: ExampleCall, lifted: Sequence[Lifted]
) -> tuple[list[Lifted], list[Lifted]]:
    """Splits the tensors: factors that a call uses only in low-rank branches of linear layers (all or none), others."""
    likely, others = [tensor for tensor in lifted if tensor.factor], [tensor for tensor in lifted if not tensor.factor]
    if likely:
        inputs = {**example.copy(), **({SLOTS: {tensor.name: tensor.tensor for tensor in others}} if others else {})}
        with forward_with(model, example, others) as called, by_name(likely), torch.random.fork_rng(), torch.no_grad():
            with contextlib.suppress(Exception):
                called(**inputs)
                return likely, others
    return [], list(lifted)


def add_named_inputs(onnx_program: Any, named: Sequence[Lifted], order: Sequence[str]) -> None:
    """Adds graph inputs for tensors that the graph uses by name, and moves all slots behind the other inputs."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    new_inputs = {}
    for tensor in named:
        shape = [
            f"{tensor.name}.rank" if axis == tensor.free else size for axis, size in enumerate(tensor.tensor.shape)
        ]
        kind = ir.TensorType(from_torch_dtype(tensor.tensor.dtype))
        new_inputs[tensor.name] = ir.Value(name=f"{SLOTS}.{tensor.name}", shape=ir.Shape(shape), type=kind)
    write_branches(onnx_program, new_inputs)
    inputs = onnx_program.graph.inputs
    by_name = {value.name: value for value in [*inputs, *new_inputs.values()]}
    slots = [by_name[name] for name in order if name in by_name]
    ordered = set(order)
    others = [value for value in inputs if value.name not in ordered]
    inputs.clear()
    inputs.extend([*others, *slots])
