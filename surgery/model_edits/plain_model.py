"""Builds the plain model of a configuration on the meta device.

A model whose layers were dropped or repeated is meant to be the model that its class builds from a configuration with
that number of layers. So a model of the old configuration and a model of the new one say which attributes depend on a
layer's position: the index that caches use, a scale that grows with the depth.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.patterns.module_class import class_of
from surgery.patterns.wrappers import submodule

__all__ = ["build_plain", "call_problem", "config_problem", "configured"]


def configured(root: nn.Module, path: str) -> str | None:
    """Return the path of the outermost module around a path that a configuration describes; None without one."""
    for above in _prefixes(path):
        module = submodule(root, above)
        if hasattr(getattr(module, "config", None), "to_dict") and hasattr(class_of(module), "config_class"):
            return above
    return None


def build_plain(module: nn.Module, config: Any) -> nn.Module | None:
    """Return a model of the same class from a configuration, without weights; None if the class does not take it."""
    try:
        with _quiet(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            return class_of(module)(copy.deepcopy(config)).train(module.training)
    except Exception:  # whatever the class raises for a configuration that it does not take
        return None


def call_problem(before: nn.Module, after: nn.Module) -> str | None:
    """Return why a plain model can't be called, if another one can: the error's text.

    Both are on the meta device, and are called with the smallest inputs of their kind. Returns None, too, if `before`
    can't be called so, because then the call says nothing.
    """
    for inputs in _small_inputs(before):
        error = _call_error(before, inputs)
        if error is None:
            error = _call_error(after, inputs)
            return _first_line(error) if error is not None else None
        other = _call_error(after, inputs)
        # Code that does not run on the meta device raises RuntimeErrors; another error comes from the model's own code.
        if other is not None and type(other) is not type(error) and isinstance(other, (ValueError, LookupError)):
            return _first_line(other)
    return None


def config_problem(config: Any, plain: nn.Module) -> str | None:
    """Return why a configuration is not the same once it is saved and read again; None if it is.

    `plain`: the model that it builds.
    """
    try:
        with _quiet():
            again = type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:  # whatever the class raises for values that do not fit
        return f"it can't be read again once it is saved: {_first_line(error)}"
    rebuilt = build_plain(plain, again)
    if rebuilt is None:
        return "once it is saved and read again, it does not build a model"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def _call_error(model: nn.Module, inputs: dict[str, Any]) -> Exception | None:
    training = model.training
    try:
        with _quiet(), torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:  # whatever the model's code raises
        return error
    finally:
        model.train(training)
    return None


def _small_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Inputs of calls on the meta device: token ids with and without a mask, pixels, or a wave."""
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        inputs, pixels = list[dict[str, Any]](), _pixels(getattr(config, "vision_config", None))
        takes_pixels = "pixel_values" in inspect.signature(class_of(model).forward).parameters
        images = [{"pixel_values": one} for one in pixels] if takes_pixels else []
        for length in (64, 8):  # long enough for models that shorten the text, else short
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            more = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
            inputs += [{"input_ids": ids, **more}, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}]
        return [{**text, **image} for image in images for text in inputs] + inputs
    if name == "input_values":
        return [{"input_values": torch.zeros(1, length, device="meta")} for length in (8000, 400)]
    return [{"pixel_values": pixels} for pixels in _pixels(config)] if name == "pixel_values" else []


def _pixels(config: Any) -> list[torch.Tensor]:
    """Images on the meta device for a configuration of a vision model; none if it does not say their channels."""
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if type(channels) is not int:
        return []
    sizes = [64, 224] if size is None else [size]  # convolutions take any size
    shapes = [tuple(size) if isinstance(size, (list, tuple)) else (size, size) for size in sizes]
    return [torch.zeros(1, channels, *shape, device="meta") for shape in shapes]


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".") if path else []
    for depth in range(len(names) + 1):
        yield ".".join(names[:depth])


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
