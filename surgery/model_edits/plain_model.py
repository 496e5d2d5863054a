"""Builds the plain model of a configuration on the meta device.

A model whose layers were dropped or repeated is meant to be the model that its class builds from a configuration with
that number of layers. So a model of the old configuration and a model of the new one say which attributes depend on a
layer's position: the index that caches use, a scale that grows with the depth.
"""

from __future__ import annotations

import copy
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
    inputs = _small_inputs(before)
    if inputs is None or _call_error(before, inputs) is not None:
        return None
    return _call_error(after, inputs)


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


def _call_error(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    training = model.training
    try:
        with _quiet(), torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:  # whatever the model's code raises
        return _first_line(error)
    finally:
        model.train(training)
    return None


def _small_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Inputs of a call on the meta device: token ids, or pixels of the configuration's size."""
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
        return {
            "input_ids": ids,
            **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}),
        }
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and size is not None and type(channels) is int:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, channels, height, width, device="meta")}
    return None


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
