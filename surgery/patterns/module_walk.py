"""Walks over a model's modules, skipping adapter containers and looking through wrappers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surgery.patterns.wrappers import inner_of, unwrap

__all__ = ["RESERVED", "base_modules", "every_path", "is_adapters"]

RESERVED = "adapters"  # the child of a site under which its adapters' tensors live


def every_path(
    model: nn.Module, path: str = "", above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but with every path of a shared module, and without wrappers and adapter containers."""
    model = unwrap(model)
    if id(model) in above:
        return
    yield path, model
    below = above | {id(model)}
    for name, child in model._modules.items():
        if child is not None and not (name == RESERVED and is_adapters(child)):
            yield from every_path(child, f"{path}.{name}" if path else name, below)


def base_modules(model: nn.Module, stop: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but without wrappers and adapter containers, so many adapters cost no time.

    A wrapper (checkpoint_wrapper, torch.compile) and its name segment are skipped. `stop`: modules below the model
    with this attribute in their `__dict__` are skipped with all their children.
    """
    visited: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        while (inner := inner_of(module)) is not None:
            module = inner
        if module not in visited and not (stop and path and stop in module.__dict__):
            visited.add(module)
            yield path, module
            for name, child in reversed(module._modules.items()):
                if child is not None and not (name == RESERVED and is_adapters(child)):
                    waiting.append((f"{path}.{name}" if path else name, child))


def is_adapters(module: nn.Module) -> bool:
    return getattr(type(module), "_surgery_adapters", False)


def tensor_key(path: str, name: str) -> str:
    """The name of an adapter's tensor in a state dict: `encoder.0.query.adapters.default.A`."""
    return ".".join(filter(None, (path, RESERVED, name)))
