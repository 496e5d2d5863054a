"""From a model and an example call to an ONNX graph, with some of the model's tensors as inputs of the graph."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError
from surgery.onnx.calls.example import (
    ExampleCall,
    cache_name,
    is_cache,
    is_transformers,
    leaves_of,
    plain,
    register_caches,
)
from surgery.onnx.calls.sliding_windows import whole
from surgery.onnx.graph.attention import REPLACED
from surgery.onnx.graph.export_errors import export_failure
from surgery.onnx.graph.finish import require_inputs
from surgery.onnx.graph.low_rank_op import by_name, written_out
from surgery.onnx.graph.op_translations import replaced, translations
from surgery.onnx.graph.recurrent import recurrent_layers
from surgery.onnx.graph.weight_names import names_kept
from surgery.tracing.example_call import copied

__all__ = ["Lifted", "Program", "SLOTS", "program_of", "split_factors"]

SLOTS = "surgery_slots"  # the argument that carries lifted tensors


@dataclass
class Lifted:
    """A tensor of an adapter that is an input of the graph; `free`: the axis of any size, such as a rank; `factor`:
    whether it is likely to be nothing but a factor of a linear layer's branch."""

    name: str
    box: nn.Module
    key: str
    tensor: Tensor
    free: int | None = None
    factor: bool = False

    @classmethod
    def out_of(cls, name: str, box: nn.Module, key: str, free: int | None = None, factor: bool = False) -> Lifted:
        """Take a tensor out of the module that holds it, until a call brings it back."""
        tensors: Any = box._parameters if key in box._parameters else box._buffers
        tensor = tensors.pop(key)
        box._buffers[key] = None  # what looks for it finds a place
        return cls(name, box, key, tensor.detach(), free, factor)


@dataclass
class Program:
    """The graph, and which of its inputs are the example's tensors; the others are the lifted ones."""

    model: Any  # onnx_ir.Model
    inputs: dict[str, str]  # the example's tensors → inputs of the graph


def program_of(
    model: nn.Module,
    example: ExampleCall,
    lifted: Sequence[Lifted],
    shapes: Mapping[str, Any],
    how: Any,
) -> Program:
    """Export the model, which is a copy that may be changed. `SurgeryError` where not. `how`: its `Settings`."""
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    named, brought = split_factors(model, example, lifted)
    inputs = dict(example.copy())
    dynamic = dict(shapes)
    if brought:
        inputs[SLOTS] = {tensor.name: tensor.tensor for tensor in brought}
        auto = torch.export.Dim.AUTO
        dynamic[SLOTS] = {tensor.name: {} if tensor.free is None else {tensor.free: auto} for tensor in brought}
    with (
        _forward_with(model, example, brought) as exported,
        _quiet(),
        _no_idle_masks(),
        names_kept(),
        by_name(named),
        recurrent_layers(),
        torch.no_grad(),
    ):
        try:
            export = _exporter(exported, inputs)
            with _patched_attention(how, exported):
                onnx_program = export(exported, inputs, dynamic, how)
            slots = [f"{SLOTS}.{tensor.name}" for tensor in lifted]
            _bring(onnx_program, named, slots)
            require_inputs(onnx_program, slots, "the exporter's passes")
            if how.optimize_for == "ort":
                fused(onnx_program)
                require_inputs(onnx_program, slots, "onnxruntime's fusions")
        except SurgeryError:
            raise
        except Exception as error:
            raise export_failure(model, error) from error
    graph = onnx_program.graph
    taken = [value for value in graph.inputs if not value.name.startswith(f"{SLOTS}.")]
    for value in graph.inputs:
        value.name = value.name.removeprefix(f"{SLOTS}.")
    if len(taken) != len(names) or len(graph.inputs) - len(taken) != len(lifted):
        missing = {tensor.name for tensor in lifted} - {value.name for value in graph.inputs}
        raise SurgeryError(
            "the exported graph has other inputs than the call",
            why=f"it has {len(graph.inputs)} for {len(names) + len(lifted)}; missing: {', '.join(sorted(missing)[:3])}",
        )
    for value, name in zip(taken, names, strict=True):
        value.name = name
    _name_outputs(graph)
    return Program(onnx_program, {name: value.name for name, value in zip(names, taken, strict=True)})


# Factors that the graph gets at the end ---------------------------------------------------------------------------


def split_factors(
    model: nn.Module, example: ExampleCall, lifted: Sequence[Lifted]
) -> tuple[list[Lifted], list[Lifted]]:
    """Those at which a call shows that linear layers' branches alone look, all that may be so or none; the others."""
    likely, others = [tensor for tensor in lifted if tensor.factor], [tensor for tensor in lifted if not tensor.factor]
    if likely:
        inputs = {**example.copy(), **({SLOTS: {tensor.name: tensor.tensor for tensor in others}} if others else {})}
        with _forward_with(model, example, others) as called, by_name(likely), torch.random.fork_rng(), torch.no_grad():
            with contextlib.suppress(Exception):
                called(**inputs)
                return likely, others
    return [], list(lifted)


def _bring(onnx_program: Any, named: Sequence[Lifted], order: Sequence[str]) -> None:
    """Give the graph the inputs that it has by name so far; all slots' stand in this order after the others."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    new_inputs = {}
    for tensor in named:
        shape = [
            f"{tensor.name}.rank" if axis == tensor.free else size for axis, size in enumerate(tensor.tensor.shape)
        ]
        kind = ir.TensorType(from_torch_dtype(tensor.tensor.dtype))
        new_inputs[tensor.name] = ir.Value(name=f"{SLOTS}.{tensor.name}", shape=ir.Shape(shape), type=kind)
    written_out(onnx_program, new_inputs)
    inputs = onnx_program.graph.inputs
    by_name = {value.name: value for value in [*inputs, *new_inputs.values()]}
    slots = [by_name[name] for name in order if name in by_name]
    ordered = set(order)
    others = [value for value in inputs if value.name not in ordered]
    inputs.clear()
    inputs.extend([*others, *slots])


# The forward that is exported -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _forward_with(model: nn.Module, example: ExampleCall, lifted: Sequence[Lifted]) -> Iterator[nn.Module]:
    """A forward that takes the lifted tensors as an argument and puts them where they belong for the call.

    It is set on the instance: nothing stands around the model, so the graph's names are the model's.
    """
    own = model.forward

    @functools.wraps(own)
    def forward(**values: Any) -> Any:
        brought = values.pop(SLOTS, {})
        for tensor in lifted:
            tensor.box._buffers[tensor.key] = brought[tensor.name]
        try:
            return plain(whole(example.call(own, values)))
        finally:
            for tensor in lifted:
                tensor.box._buffers[tensor.key] = None

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [*example.values, *([SLOTS] if lifted else [])]
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    taken = _shell(model) if isinstance(model, fx.GraphModule) else model
    taken.__dict__["forward"] = forward
    try:
        yield taken
    finally:
        taken.__dict__.pop("forward", None)


def _shell(model: nn.Module) -> nn.Module:
    """A module with the same children and tensors: of a GraphModule torch.export runs the graph, and no forward."""
    holder = nn.Module()
    for name in ("_modules", "_parameters", "_buffers"):
        holder.__dict__[name] = model.__dict__[name]
    return holder.eval()


def _exporter(model: nn.Module, inputs: dict[str, Any]) -> Callable[..., Any]:
    """transformers' exporter where there are caches, which torch's does not know; it takes twice as long."""
    if not is_transformers(model):
        return _by_torch
    output = model(**{name: copied(value) for name, value in inputs.items()})
    if any(is_cache(value) for value in (*inputs.values(), *_values(output))):
        return _by_transformers
    return _by_either


def _values(output: Any) -> list[Any]:
    return list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, tuple) else []


def _by_either(model: nn.Module, inputs: dict[str, Any], shapes: Any, how: Any) -> Any:
    """torch's exporter on a model of transformers, with the latter's patches: rows that are masked as a whole, …"""
    for patches in (_patched([*_SLOW, *replaced(how)]), _patched(replaced(how))):
        try:
            with patches:
                return _by_torch(model, inputs, shapes, how)
        except Exception:  # there is more that it mends
            continue
    return _by_transformers(model, inputs, shapes, how)


# Copies of what lies otherwise in memory, which few models need to be exported at all: a third of tracing's time.
_SLOW = ("torch.reshape", "torch.Tensor.reshape", "torch.Tensor.view")


@contextlib.contextmanager
def _patched(without: Sequence[str]) -> Iterator[None]:
    with _patches(lambda name: name not in without) as utils, utils.apply_patches("onnx"):
        yield


@contextlib.contextmanager
def _patched_attention(how: Any, model: nn.Module) -> Iterator[None]:
    """For onnxruntime's fusions a module that is not transformers' has attention rewritten as theirs have it."""
    if replaced(how) or is_transformers(model):
        yield
        return
    with _patches(lambda name: name == REPLACED) as utils, utils.apply_patches("onnx"):
        yield


@contextlib.contextmanager
def _patches(kept: Callable[[str], bool]) -> Iterator[Any]:
    """transformers' list of its patches with these alone, while the block runs; gives the module that has it."""
    from transformers.exporters import exporter_onnx, utils  # noqa: F401  # the former's patches they are

    known: Any = getattr(utils, "_PATCHES", {})
    own = known.get("onnx", [])
    known["onnx"] = [entry for entry in own if kept(f"{entry[0]}.{entry[1]}")]
    try:
        yield utils
    finally:
        known["onnx"] = own


@contextlib.contextmanager
def _no_idle_masks() -> Iterator[None]:
    """Attention of all positions to all, without padding, has no mask in the graph, as it has none when it is called.

    transformers makes one while it is traced; some of its models can't take that.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    own = getattr(masks, "_ignore_bidirectional_mask_sdpa", None)
    if own is None:
        yield
        return

    def ignored(padding_mask: Any, kv_length: Any, local_attention_size: Any = None) -> Any:
        return (
            padding_mask is None and local_attention_size is None or own(padding_mask, kv_length, local_attention_size)
        )

    masks._ignore_bidirectional_mask_sdpa = ignored
    try:
        yield
    finally:
        masks._ignore_bidirectional_mask_sdpa = own


def _by_transformers(model: nn.Module, inputs: dict[str, Any], shapes: Any, how: Any) -> Any:
    """Its exporter knows caches, and what of its models torch can't export as they stand."""
    from transformers.exporters import exporter_onnx, utils
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    register_caches()
    flags = {name: value for name, value in inputs.items() if isinstance(value, (bool, str))}
    free = {name: value for name, value in shapes.items() if name not in flags}
    config = OnnxConfig(dynamic=True, dynamic_shapes=free, opset_version=how.opset, optimize=how.optimize)
    table: dict[Any, Any] = exporter_onnx._ONNX_TRANSLATION_TABLE
    own = translations(how)
    table.update(own)
    cast = getattr(utils, "cast_leaf_tensors", None)
    utils.cast_leaf_tensors = lambda value, **_: value  # adapters of a half-precision model are in float32
    try:
        with _patches(lambda name: name not in replaced(how)):
            return OnnxExporter().export(model, inputs, config).program  # type: ignore[arg-type]
    finally:
        utils.cast_leaf_tensors = cast  # type: ignore[assignment]
        for operation in own:
            table.pop(operation, None)


def _by_torch(model: nn.Module, inputs: dict[str, Any], shapes: Any, how: Any) -> Any:
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    names = [name for name, leaf in leaves_of(inputs) if isinstance(leaf, Tensor) and not name.startswith(SLOTS)]
    names += [f"{SLOTS}.{name}" for name in inputs.get(SLOTS, {})]
    outputs = _output_names(exported)
    program: Any = torch.onnx.export(
        exported,
        (),
        kwargs=inputs,
        input_names=names,
        opset_version=how.opset,
        optimize=how.optimize,
        verbose=False,
        custom_translation_table=translations(how),
    )
    for value, name in zip(program.model.graph.outputs, outputs, strict=False):
        if not value.is_graph_input():
            value.name = name
    return program.model


def _output_names(exported: Any) -> list[str]:
    """By what the model returns: a tensor is `output`, of a mapping each has its key, of a tuple its place."""
    spec = exported.call_spec.out_spec
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(dummy)
    names = []
    for path, _ in paths:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        text = ".".join(keys)
        names.append("output" if not text else f"output_{text}" if text[0].isdigit() else text)
    return names


# What is done to passes and to what they print -------------------------------------------------------------------


def fused(model: Any) -> None:
    """onnxruntime's own operations for attention and normalisation, by transformers' rewriting."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(model, "cpu")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print what they do, and warn of what is in hand here."""
    names = (
        "transformers",
        "torch.onnx",
        "torch.export",
        "torch._export",
        "torch.fx.experimental",
        "onnxscript",
        "onnx_ir",
    )
    symbols = "torch.fx.experimental.symbolic_shapes"  # it has a level of its own
    loggers = {name: logging.getLogger(name) for name in (*names, symbols)}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL)
        silent = io.StringIO()  # a graph that can't be exported is printed, thousands of lines of it
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _name_outputs(graph: Any) -> None:
    """What comes out of a cache is `present`, and what goes in `past_key_values`."""
    for value in graph.outputs:
        name = re.sub(r"^output\.", "", value.name or "")
        value.name = cache_name(re.sub(r"^past_key_values\.", "present.", name))
