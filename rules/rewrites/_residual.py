"""Finds residual streams whose features can be centred: all layers that write to one, and the norms that read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery import class_of, graph_of
from surgery.rules.rewrites._chains import has_hooks

__all__ = ["Streams", "features_dim", "find_streams", "is_writer"]

# Operations that keep the mean of the features 0, where it is 0 in all their operands.
_KEEPING = frozenset(
    "add dropout to contiguous float double half bfloat16 type_as clone alias identity view squeeze unsqueeze".split()
)
_SHAPE = frozenset({"shape", "ndim", "dtype", "device", "requires_grad", "is_cuda"})
_READING = frozenset({"getattr", "size", "dim", "layer_norm"})  # they do not depend on the mean of the features


@dataclass
class Streams:
    """What `find_streams` returns.

    Attributes:
        norms: The path of each norm → the paths of the layers that write what it reads, in the graph's order.
        readers: The path of each norm → the paths of the Linears that alone read its result; None if others do.
        reasons: The path of each norm that stays → why.
    """

    norms: dict[str, list[str]] = field(default_factory=dict)
    readers: dict[str, list[str] | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def is_writer(module: nn.Module) -> bool:
    """Whether the outputs of a module can be centred by its weight and bias: a Linear, a Conv1D or an Embedding."""
    kind = class_of(module)
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module._modules.keys() - {"adapters"}
    return kind is nn.Linear or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def features_dim(module: nn.Module) -> int:
    """The dimension of a writer's weight along its output features."""
    return 0 if class_of(module) is nn.Linear else 1


def find_streams(model: nn.Module, example_inputs: Any) -> Streams:
    """Find the LayerNorms whose inputs are sums of layers that can be centred.

    Centring changes the stream, so each use of it must be without regard to the mean of the features: a sum with other
    parts of the stream, or a LayerNorm.
    """
    return _Search(model, graph_of(model, example_inputs)).streams()


class _Search:
    def __init__(self, model: nn.Module, graph: Any):
        self.model, self.graph = model, graph
        self.data: dict[Any, dict[str, Any]] = dict(graph.nodes(data=True))
        self.order = {node: index for index, node in enumerate(self.data)}
        self.owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        calls = [d["path"] for d in self.data.values() if d["operation"] in ("linear", "addmm", "embedding")]
        self.calls = Counter(calls)
        self.place: dict[str, int] = {}  # the path of a module → the place of its first operation
        for node, data in self.data.items():
            if data["op"] != "get_attr":
                self.place.setdefault(data["path"] or "", self.order[node])
        self.reads: dict[str, list[Any]] = {}  # the full name of a tensor → the nodes that read it
        for node, data in self.data.items():
            if data["op"] == "get_attr":
                self.reads.setdefault(".".join(filter(None, (data["path"], str(data["target"])))), []).append(node)

    def streams(self) -> Streams:
        result = Streams()
        for node, data in self.data.items():
            if data["op"] != "call_module" or data["type"] is not nn.LayerNorm:
                continue
            writers, why = self.writers(next(iter(data["operands"])))
            features = {self.features(path) for path in writers}
            norm: Any = self.model.get_submodule(data["path"])
            if not why and (len(features) > 1 or tuple(features) != tuple(norm.normalized_shape)):
                why = f"it is over {norm.normalized_shape}, and the layers before it return {sorted(features)} features"
            if why:
                result.reasons[data["path"]] = why
            else:
                result.norms[data["path"]] = writers
                result.readers[data["path"]] = self.readers(node)
        return result

    def features(self, path: str) -> int:
        module: Any = self.model.get_submodule(path)
        return module.weight.shape[features_dim(module)]

    def writers(self, value: Any) -> tuple[list[str], str]:
        """Returns the layers whose sum a value is, and why they can't be centred."""
        writers: dict[str, None] = {}
        waiting, visited = [value], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in visited:
                continue
            visited.add(node)
            data = self.data.get(node)
            if data is None:
                return [], f"{node} is added to what it reads"
            if why := self.use(node):
                return [], why
            if (path := self.writer(data)) is not None:
                if why := self.writer_objection(path):
                    return [], why
                writers[path] = None
                continue
            operands = [operand for operand in data["operands"] if operand in self.data] if _hashable(data) else []
            if data["operation"] not in _KEEPING or data["op"] == "placeholder" or not operands:
                what = f"{data['path'] or 'the model'}, which" if data["type"] else "an input:"
                return [], f"its input is not a sum of layers: {what} computes {node} by {data['operation']}"
            if data["operation"] == "add" and len(operands) < 2:
                return [], f"a number is added to what it reads, at {node}"
            operands = operands if data["operation"] == "add" else operands[:1]
            waiting += operands
            if not all(self.same_features(operand, node) for operand in operands):
                return [], f"{node} changes the number of features"
        return sorted(writers, key=self.place.__getitem__), ""

    def writer(self, data: dict[str, Any]) -> str | None:
        """Returns the path of the layer whose product an operation is."""
        if data["operation"] not in ("linear", "addmm", "embedding") or not data["path"]:
            return None
        return data["path"] if is_writer(self.model.get_submodule(data["path"])) else None

    def writer_objection(self, path: str) -> str | None:
        module: Any = self.model.get_submodule(path)
        if self.calls[path] != 1:
            return f"{path} is called {self.calls[path]} times"
        if has_hooks(module) or hasattr(type(module), "_surgery_base"):
            return f"{path} has hooks or rules of its own"
        for name in module._parameters:
            users = [user for node in self.reads.get(f"{path}.{name}", ()) for user in self.graph.successors(node)]
            if others := [user for user in users if self.data[user]["path"] != path]:
                return f"{others[0]} uses the {name} of {path}, too"
        shared = any(self.owners[id(p)] > 1 for p in module._parameters.values() if p is not None)
        if shared and not isinstance(module, nn.Embedding):
            return f"a tensor of {path} belongs to another module, too"
        return None

    def use(self, node: Any) -> str:
        """Returns why a use of a stream value depends on the mean of its features; "" if none does."""
        waiting, visited = [node], set[Any]()
        while waiting:
            current = waiting.pop()
            if current in visited:
                continue
            visited.add(current)
            for user in self.graph.successors(current):
                data = self.data[user]
                if data["operation"] in _READING and self.is_invariant(current, user):
                    continue
                if data["operation"] not in _KEEPING or not self.same_features(current, user):
                    what = "the model returns" if data["op"] == "output" else f"{data['path'] or 'the model'} reads"
                    return f"{what} the stream ({current}) otherwise than by a LayerNorm"
                waiting.append(user)
        return ""

    def is_invariant(self, node: Any, user: Any) -> bool:
        """Whether a use does not depend on the mean of the features: a norm over these, or a read of the shape.

        An attribute that is read may be a tensor of the layer, such as the weight of an embedding that is a head, too.
        """
        data = self.data[user]
        if data["operation"] == "getattr":
            return data["operands"][1] in _SHAPE
        if data["operation"] != "layer_norm":
            return True
        sizes = data["operands"][1] if len(data["operands"]) > 1 else ()
        shape = self.data[node]["shape"]
        return shape is None or tuple(sizes) == tuple(shape[-1:])

    def same_features(self, node: Any, user: Any) -> bool:
        one, other = self.data[node]["shape"], self.data[user]["shape"]
        return one is None or other is None or one[-1:] == other[-1:]

    def readers(self, norm: Any) -> list[str] | None:
        """Returns the Linears that alone read a norm's result."""
        readers: dict[str, None] = {}
        waiting = [norm]
        while waiting:
            current = waiting.pop()
            for user in self.graph.successors(current):
                data = self.data[user]
                if data["operation"] in ("view", "contiguous", "to", "getitem") and self.same_features(current, user):
                    waiting.append(user)
                elif data["operation"] in ("linear", "addmm") and (path := self.writer(data)) is not None:
                    if self.calls[path] != 1 or has_hooks(self.model.get_submodule(path)):
                        return None
                    readers[path] = None
                elif data["operation"] not in _READING or data["op"] == "call_module":
                    return None
        return list(readers) or None


def _hashable(data: dict[str, Any]) -> bool:
    try:
        hash(data["operands"])
    except TypeError:
        return False
    return True
