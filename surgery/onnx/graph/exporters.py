"""Chooses and runs an exporter, torch's or transformers', with the patches that a model needs."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.onnx.calls.example import is_cache, is_transformers, leaves_of, register_caches
from surgery.onnx.graph.attention import REPLACED
from surgery.onnx.graph.lifted_tensors import SLOTS
from surgery.onnx.graph.op_translations import replaced_patches, translations
from surgery.transaction.object_contents import copied

__all__ = ["exporter_for", "fuse", "no_idle_masks", "patched_attention", "quiet"]


def exporter_for(model: nn.Module, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Returns transformers' exporter for models with caches, which torch's does not know. It takes twice as long."""
    if not is_transformers(model):
        return _by_torch
    output = model(**{name: copied(value) for name, value in inputs.items()})
    if any(is_cache(value) for value in (*inputs.values(), *_values(output))):
        return _by_transformers
    return _by_either


def _values(output: Any) -> list[Any]:
    return list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, tuple) else []


def _by_either(model: nn.Module, inputs: dict[str, Any], shapes: Any, how: Any) -> Any:
    """Tries torch's exporter with transformers' fast patches, then with all patches, then transformers' exporter."""
    for patches in (_patched_without([*_SLOW, *replaced_patches(how)]), _patched_without(replaced_patches(how))):
        try:
            with patches:
                return _by_torch(model, inputs, shapes, how)
        except Exception:  # the next attempt has more patches
            continue
    return _by_transformers(model, inputs, shapes, how)


# Patches that copy tensors of other memory layouts. Few models need them, and they take a third of the tracing time.
_SLOW = ("torch.reshape", "torch.Tensor.reshape", "torch.Tensor.view")


@contextlib.contextmanager
def _patched_without(without: Sequence[str]) -> Iterator[None]:
    with _patches(lambda name: name not in without) as utils, utils.apply_patches("onnx"):
        yield


@contextlib.contextmanager
def patched_attention(how: Any, model: nn.Module) -> Iterator[None]:
    """Rewrites attention as transformers does, for other models too: onnxruntime's fusions recognise that form."""
    if replaced_patches(how) or is_transformers(model):
        yield
        return
    with _patches(lambda name: name == REPLACED) as utils, utils.apply_patches("onnx"):
        yield


@contextlib.contextmanager
def _patches(selected: Callable[[str], bool]) -> Iterator[Any]:
    """Keeps only the selected patches in transformers' list during the block. Yields the module with the list."""
    from transformers.exporters import exporter_onnx, utils  # noqa: F401  # exporter_onnx registers the patches

    registry: Any = getattr(utils, "_PATCHES", {})
    entries = registry.get("onnx", [])
    registry["onnx"] = [entry for entry in entries if selected(f"{entry[0]}.{entry[1]}")]
    try:
        yield utils
    finally:
        registry["onnx"] = entries


def _by_transformers(model: nn.Module, inputs: dict[str, Any], shapes: Any, how: Any) -> Any:
    """Runs transformers' exporter, which handles caches and models that torch can't export unchanged."""
    from transformers.exporters import exporter_onnx, utils
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    register_caches()
    flags = {name: value for name, value in inputs.items() if isinstance(value, (bool, str))}
    free = {name: value for name, value in shapes.items() if name not in flags}
    config = OnnxConfig(dynamic=True, dynamic_shapes=free, opset_version=how.opset, optimize=how.optimize)
    table: dict[Any, Any] = exporter_onnx._ONNX_TRANSLATION_TABLE
    additions = translations(how)
    table.update(additions)
    cast = getattr(utils, "cast_leaf_tensors", None)
    utils.cast_leaf_tensors = lambda value, **_: value  # adapters of a half-precision model are in float32
    try:
        with _patches(lambda name: name not in replaced_patches(how)):
            return OnnxExporter().export(model, inputs, config).program  # type: ignore[arg-type]
    finally:
        utils.cast_leaf_tensors = cast  # type: ignore[assignment]
        for operation in additions:
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
    """Returns the outputs' names: `output` for a single tensor, keys of a mapping, positions of a tuple."""
    spec = exported.call_spec.out_spec
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(dummy)
    names = []
    for path, _ in paths:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        text = ".".join(keys)
        names.append("output" if not text else f"output_{text}" if text[0].isdigit() else text)
    return names


def fuse(model: Any) -> None:
    """Replaces attention and normalisation by onnxruntime's own operations, with transformers' rewriter."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(model, "cpu")


# Contexts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_idle_masks() -> Iterator[None]:
    """Keeps full attention without padding free of a mask in the graph, as in a call.

    transformers makes a mask while it is traced, and some of its models do not accept that mask.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    original = getattr(masks, "_ignore_bidirectional_mask_sdpa", None)
    if original is None:
        yield
        return

    def ignore_mask(padding_mask: Any, kv_length: Any, local_attention_size: Any = None) -> Any:
        return (
            padding_mask is None
            and local_attention_size is None
            or original(padding_mask, kv_length, local_attention_size)
        )

    masks._ignore_bidirectional_mask_sdpa = ignore_mask
    try:
        yield
    finally:
        masks._ignore_bidirectional_mask_sdpa = original


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what exporters log and print, and warnings about things that this export handles."""
    names = (
        "transformers",
        "torch.onnx",
        "torch.export",
        "torch._export",
        "torch.fx.experimental",
        "onnxscript",
        "onnx_ir",
    )
    symbols = "torch.fx.experimental.symbolic_shapes"  # this logger has its own level
    loggers = {name: logging.getLogger(name) for name in (*names, symbols)}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL)
        output = io.StringIO()  # exporters print a failing graph, thousands of lines
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
