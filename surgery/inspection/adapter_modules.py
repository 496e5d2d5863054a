"""Calls of an adapter's own modules (`Site.submodule`) as `show` writes them: `LayerNorm(self.adapters.a)(x)`."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from surgery.authoring.module_skeleton import Skeleton

__all__ = ["AdapterModule", "adapter_of"]


class AdapterModule:
    """Makes a module of an adapter callable: the module with the tensors that the adapter holds for it.

    Two arguments of the engine's own call are not written: the tensor that gives the result its dtype if no input is a
    floating-point tensor, and mappings of further keyword arguments.
    """

    def __init__(self, skeleton: Skeleton, words: tuple[str, ...]):
        self.skeleton, self.words = skeleton, words
        self.__name__ = self.__qualname__ = skeleton.__name__

    def __call__(self, adapter: nn.Module, training: bool) -> Any:
        tensors = {word: getattr(adapter, name) for word, name in zip(self.skeleton.words, self.words, strict=True)}
        return lambda *args, **kwargs: self.skeleton(tensors, training, args, kwargs)


def adapter_of(node: fx.Node) -> tuple[str, tuple[str, ...]] | None:
    """The path of the adapter that holds all tensors of a call of its module, and their names there.

    None if the node is not such a call, or if it has arguments that an `AdapterModule` does not take.
    """
    if not isinstance(node.target, Skeleton) or len(node.args) < 4 or any(node.args[5:6]):
        return None
    tensors: Any = node.args[0]
    if not isinstance(tensors, dict) or not all(
        isinstance(x, fx.Node) and x.op == "get_attr" for x in tensors.values()
    ):
        return None
    paths = [str(tensors[word].target).rpartition(".") for word in node.target.words]
    owners = {owner for owner, _, _ in paths}
    if len(owners) != 1 or not (owner := owners.pop()).startswith("adapters."):
        return None
    return owner, tuple(name for _, _, name in paths)
