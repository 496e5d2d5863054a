"""The example call of an export: its arguments by name, and the same call with other tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError
from surgery.onnx.calls.sliding_windows import adapter_notes, with_plain_caches
from surgery.tracing.example_call import arguments
from surgery.transaction.object_contents import copied

__all__ = [
    "ExampleCall", "array_of", "arrays_of", "cache_name", "is_cache", "is_transformers", "leaves_of", "outputs_of",
    "without_dataclasses",
]  # fmt: skip

STARRED = "input_"  # prefix for names of arguments that a forward takes as `*args`


@dataclass
class ExampleCall:
    """The arguments of one call by name, in the forward's order. `positional`: names that are passed by position."""

    values: dict[str, Any]
    positional: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> ExampleCall:
        """Binds the inputs to the forward. Raises `SurgeryError` if the forward does not take them."""
        if isinstance(example_inputs, ExampleCall):
            return example_inputs
        args, kwargs = arguments(example_inputs)
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SurgeryError(
                f"{type(model).__name__}.forward does not take these example inputs",
                why=str(error),
                fix="pass a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from None
        values: dict[str, Any] = {}
        positional: list[str] = []
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                starred = {f"{STARRED}{len(positional) + i}": item for i, item in enumerate(value)}
                values.update(starred)
                positional += starred
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
                if kind is inspect.Parameter.POSITIONAL_ONLY or _starred(signature):
                    positional.append(name)
        if "labels" in values or "future_values" in values:
            raise SurgeryError(
                "the example has labels",
                why="with labels the model returns a loss, which can't be exported",
                fix="leave them out of example_inputs",
            )
        _refuse_adapter_notes(values)
        values_copied = {name: copied(with_plain_caches(value)) for name, value in values.items() if value is not None}
        if not any(isinstance(leaf, Tensor) for _, leaf in leaves_of(values_copied)):
            raise SurgeryError("the example has no tensors", fix="pass the tensors with which the model is called")
        return cls(values_copied, tuple(name for name in positional if name in values_copied))

    def call(self, forward: Callable[..., Any], values: Mapping[str, Any] | None = None) -> Any:
        """Call a forward with these arguments, or with others of the same names."""
        arguments_of_call = self.values if values is None else values
        return forward(
            *(arguments_of_call[name] for name in self.positional),
            **{k: v for k, v in arguments_of_call.items() if k not in self.positional},
        )

    @property
    def example(self) -> Any:
        """The call as `example_inputs` of `apply_rules`."""
        return tuple(self.values.values()) if set(self.positional) == set(self.values) else dict(self.values)

    def copy(self) -> dict[str, Any]:
        return {name: copied(value) for name, value in self.values.items()}

    def resized(self, sizes: Callable[[str, Tensor], tuple[int, ...]]) -> ExampleCall:
        """Returns the same call with other tensor sizes: tensors are repeated, or cut."""
        return self.mapped(lambda name, tensor: _resize(tensor, sizes(name, tensor)))

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> ExampleCall:
        """Returns the same call with other tensors. `change` gets each tensor's name and value."""

        def change_value(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(name, value)
            if isinstance(value, (str, int, float, bool)):
                return value
            return _map_tensors(value, name, change_value)

        with torch.no_grad():
            return ExampleCall(
                {name: change_value(name, value) for name, value in self.values.items()}, self.positional
            )


def _refuse_adapter_notes(values: Mapping[str, Any]) -> None:
    """Refuses a cache that adapters filled: the file takes all positions as text, and has no input for their notes."""
    for name, value in values.items():
        if is_cache(value) and adapter_notes(value):
            raise SurgeryError(
                "the example's cache was filled with an adapter's virtual tokens",
                where=name,
                why="the file takes all positions of a cache as text, for any adapter",
                fix="leave the cache out and use cache=True, or fill it in a `using(model, None)` block",
            )


def _starred(signature: inspect.Signature) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values())


def _resize(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for dim, size in enumerate(sizes):
        if size != tensor.shape[dim]:
            if not tensor.shape[dim]:
                tensor = tensor.new_zeros((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]))
            else:
                index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)
    return tensor.contiguous()


def _map_tensors(value: Any, name: str, change: Callable[[str, Any], Any]) -> Any:
    """Returns a container with changed tensors: any that pytree knows, including transformers' caches."""
    leaves = _named_leaves(name, value)
    _, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([change(path, leaf) for path, leaf in leaves], spec)


def leaves_of(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the arguments' leaves with names such as `ids`, `masks.left`, `past_key_values.0.key`."""
    return [leaf for name, value in values.items() for leaf in _named_leaves(name, value)]


def _named_leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if value is None or isinstance(value, (Tensor, str, int, float, bool)):
        return [(name, value)]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _named_leaves(f"{name}.{key}", item)]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _named_leaves(f"{name}.{i}", item)]
    register_caches()
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return [(name, value)]
    paths: dict[int, str] = {}
    if _from_transformers(value):
        from transformers.exporters.utils import get_leaf_tensors

        paths = {id(tensor): cache_name(f"{name}.{path}") for path, tensor in get_leaf_tensors(value).items()}
    return [(paths.get(id(leaf), f"{name}.{i}"), leaf) for i, leaf in enumerate(leaves)]


_CACHED = re.compile(r"(?:past_key_values|present)\.(?:(self|cross)_attention_cache\.)?layers\.(\d+)\.(key|value)s")


def cache_name(name: str) -> str:
    """Returns the name that serving programs expect: past_key_values.0.key, or …0.encoder.key of an encoder-decoder."""
    match = _CACHED.fullmatch(name)
    if match is None:
        return name
    side = {"self": "decoder.", "cross": "encoder.", None: ""}[match[1]]
    return f"{name.partition('.')[0]}.{match[2]}.{side}{match[3]}"


def is_transformers(model: nn.Module) -> bool:
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def register_caches() -> None:
    """Registers transformers' caches as pytree nodes, as transformers' exporter does."""
    import sys

    if "transformers" in sys.modules:
        from transformers.cache_utils import Cache
        from transformers.exporters.exporter_dynamo import register_pytree_node

        pending: list[type] = [Cache]
        while pending:
            kind = pending.pop()
            if kind not in pytree.SUPPORTED_NODES:
                register_pytree_node(kind)
            pending += kind.__subclasses__()


def arrays_of(example: ExampleCall, inputs: Sequence[str]) -> dict[str, Any]:
    """Returns a call's tensors as arrays, by the names of the graph's inputs."""
    tensors = [leaf for _, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    return {name: array_of(tensor) for name, tensor in zip(inputs, tensors, strict=True)}


def array_of(tensor: Tensor) -> Any:
    """Returns a tensor as a numpy array; bfloat16 as the dtype of ml_dtypes."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def outputs_of(output: Any) -> list[Tensor]:
    """Returns a model's output as a flat list, in the order of an exported graph's outputs."""
    if isinstance(output, Tensor):
        return [output]
    register_caches()
    output = with_plain_caches(output)
    if _from_transformers(output):
        from transformers.exporters.utils import get_leaf_tensors

        return list(get_leaf_tensors(output).values())
    output = without_dataclasses(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _from_transformers(output: Any) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(output).__mro__)


def without_dataclasses(output: Any) -> Any:
    """Replaces dataclasses in a model's output, which torch.export does not flatten, by dicts of their fields.

    A ModelOutput with added keys becomes a dict, too: transformers would rebuild it without these keys.
    """
    kind: Any = type(output)
    if kind is dict:
        return {key: without_dataclasses(item) for key, item in output.items()}
    if kind in (list, tuple):
        return kind(without_dataclasses(item) for item in output)
    if is_dataclass(kind) and isinstance(output, dict) and set(output) - {field.name for field in fields(kind)}:
        return {key: without_dataclasses(item) for key, item in output.items()}
    if is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        return {field.name: without_dataclasses(getattr(output, field.name)) for field in fields(kind)}
    return output
