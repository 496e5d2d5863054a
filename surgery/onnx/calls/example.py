"""The example call that an export is made from: its arguments by name, and the same call at other sizes."""

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
from surgery.onnx.calls.sliding_windows import notes, whole
from surgery.tracing.example_call import arguments, copied

__all__ = [
    "ExampleCall", "array_of", "arrays_of", "cache_name", "is_cache", "is_transformers", "leaves_of", "outputs_of",
    "plain",
]  # fmt: skip

STARRED = "input_"  # of a forward that takes any number of arguments, each by its place


@dataclass
class ExampleCall:
    """The arguments of one call by name, in the forward's order; `placed`: those that are passed by position."""

    values: dict[str, Any]
    placed: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> ExampleCall:
        """`SurgeryError` if the model's forward does not take these arguments."""
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
        placed: list[str] = []
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                starred = {f"{STARRED}{len(placed) + i}": item for i, item in enumerate(value)}
                values.update(starred)
                placed += starred
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
                if kind is inspect.Parameter.POSITIONAL_ONLY or _starred(signature):
                    placed.append(name)
        if "labels" in values or "future_values" in values:
            raise SurgeryError(
                "the example has labels", why="a loss is nothing to export", fix="leave them out of example_inputs"
            )
        _refuse_noted(values)
        values_copied = {name: copied(whole(value)) for name, value in values.items() if value is not None}
        if not any(isinstance(leaf, Tensor) for _, leaf in leaves_of(values_copied)):
            raise SurgeryError("the example has no tensors", fix="pass what the model is called with")
        return cls(values_copied, tuple(name for name in placed if name in values_copied))

    def call(self, forward: Callable[..., Any], values: Mapping[str, Any] | None = None) -> Any:
        """Call a forward with these arguments, or with others of the same names."""
        arguments_of_call = self.values if values is None else values
        return forward(
            *(arguments_of_call[name] for name in self.placed),
            **{k: v for k, v in arguments_of_call.items() if k not in self.placed},
        )

    @property
    def example(self) -> Any:
        """As `apply_rules` takes an example."""
        return tuple(self.values.values()) if set(self.placed) == set(self.values) else dict(self.values)

    def copy(self) -> dict[str, Any]:
        return {name: copied(value) for name, value in self.values.items()}

    def resized(self, sizes: Callable[[str, Tensor], tuple[int, ...]]) -> ExampleCall:
        """The same call with tensors of other sizes: repeated, or cut."""
        return self.mapped(lambda name, tensor: _sized(tensor, sizes(name, tensor)))

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> ExampleCall:
        """The same call with other tensors, each made of its name and what it was."""

        def changed(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(name, value)
            if isinstance(value, (str, int, float, bool)):
                return value
            return _mapped(value, name, changed)

        with torch.no_grad():
            return ExampleCall({name: changed(name, value) for name, value in self.values.items()}, self.placed)


def _refuse_noted(values: Mapping[str, Any]) -> None:
    """Refuse a cache that adapters filled: the file takes all of it as text, and has no input for their notes."""
    for name, value in values.items():
        if is_cache(value) and notes(value):
            raise SurgeryError(
                "the example's cache was filled with an adapter's virtual tokens",
                where=name,
                why="the file takes what a cache has as text, for any adapter",
                fix="leave the cache out and use cache=True, or fill it inside of `using(model, None)`",
            )


def _starred(signature: inspect.Signature) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values())


def _sized(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for dim, size in enumerate(sizes):
        if size != tensor.shape[dim]:
            if not tensor.shape[dim]:
                tensor = tensor.new_zeros((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]))
            else:
                at = torch.arange(size, device=tensor.device) % tensor.shape[dim]
                tensor = tensor.index_select(dim, at)
    return tensor.contiguous()


def _mapped(value: Any, name: str, changed: Callable[[str, Any], Any]) -> Any:
    """A container with its tensors changed: what pytree knows, caches of transformers included."""
    named = _named(name, value)
    _, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([changed(path, leaf) for path, leaf in named], spec)


def leaves_of(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments' tensors with their names, such as `ids`, `masks.left`, `past_key_values.0.key`."""
    return [leaf for name, value in values.items() for leaf in _named(name, value)]


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    if value is None or isinstance(value, (Tensor, str, int, float, bool)):
        return [(name, value)]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _named(f"{name}.{key}", item)]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _named(f"{name}.{i}", item)]
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
    """As serving programs know them: past_key_values.0.key; of an encoder-decoder, past_key_values.0.encoder.key."""
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
    """Let pytree look into transformers' caches, as its exporter does."""
    import sys

    if "transformers" in sys.modules:
        from transformers.cache_utils import Cache
        from transformers.exporters.exporter_dynamo import register_pytree_node

        waiting: list[type] = [Cache]
        while waiting:
            kind = waiting.pop()
            if kind not in pytree.SUPPORTED_NODES:
                register_pytree_node(kind)
            waiting += kind.__subclasses__()


def arrays_of(example: ExampleCall, inputs: Sequence[str]) -> dict[str, Any]:
    """A call's tensors as arrays, by the names of the graph's inputs."""
    tensors = [leaf for _, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    return {name: array_of(tensor) for name, tensor in zip(inputs, tensors, strict=True)}


def array_of(tensor: Tensor) -> Any:
    """A tensor as a numpy array; bfloat16, which numpy does not know, in that of ml_dtypes."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def outputs_of(output: Any) -> list[Tensor]:
    """What a model returned, flat, in the order of an exported graph's outputs."""
    if isinstance(output, Tensor):
        return [output]
    register_caches()
    output = whole(output)
    if _from_transformers(output):
        from transformers.exporters.utils import get_leaf_tensors

        return list(get_leaf_tensors(output).values())
    output = plain(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _from_transformers(output: Any) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(output).__mro__)


def plain(output: Any) -> Any:
    """What a model returned without dataclasses, which torch.export does not look into: their fields by name.

    So is a ModelOutput with keys added to it, which transformers makes anew from its own fields alone.
    """
    kind: Any = type(output)
    if kind is dict:
        return {key: plain(item) for key, item in output.items()}
    if kind in (list, tuple):
        return kind(plain(item) for item in output)
    if is_dataclass(kind) and isinstance(output, dict) and set(output) - {field.name for field in fields(kind)}:
        return {key: plain(item) for key, item in output.items()}
    if is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        return {field.name: plain(getattr(output, field.name)) for field in fields(kind)}
    return output
