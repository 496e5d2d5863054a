"""Small ONNX files with slots, built node by node, and the same arithmetic in numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from surgery.onnx import Manifest

Arrays = dict[str, np.ndarray]
ELEMENTS = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}  # fmt: skip


@dataclass
class Build:
    """Builds a graph. Slots are inputs; slots with a default are optional inputs."""

    required: bool = False  # slots_as="inputs"
    empty: str = "rank0"
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    weights: Arrays = field(default_factory=dict)
    defaults: Arrays = field(default_factory=dict)
    slots: list[dict[str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    cache: list[dict[str, str]] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=lambda: {"class": "Net", "numbers": {"w": {"values": [1.5, 2.25]}}})
    turned: set[str] = field(default_factory=set)  # weights that are stored transposed

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def number(self, value: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value)
        return name

    def input(self, name: str, dtype: str, shape: Sequence[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, ELEMENTS[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[Any]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, ELEMENTS[dtype], list(shape)))

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = array.T.copy() if name in self.turned else array
        return self.node("Transpose", name, perm=[1, 0]) if name in self.turned else name

    def site(
        self, path: str, rule: str, tensors: Mapping[str, Any], module: str = "Linear", by: Any = None,
        words: Mapping[str, str] | None = None, **further: Any,
    ) -> dict[str, str]:  # fmt: skip
        """Slots of a rule at a site: tensor → shape, or (shape, dtype), or a default array. Gives their names."""
        named = {}
        for tensor, spec in tensors.items():
            dtype, default, value = "float32", "zeros", np.zeros(0)
            if isinstance(spec, np.ndarray):
                shape, value, default = list(spec.shape), spec, "base"
            else:
                shape, dtype, default = (*spec, default)[:3] if isinstance(spec, tuple) else (spec, dtype, default)
                free = [axis for axis, size in enumerate(shape) if size is None]
                default = "empty" if free else default
                size: Any = [(0 if self.empty == "rank0" else 1) if extent is None else extent for extent in shape]
                value = (np.ones if default == "ones" else np.zeros)(size, np.float32)
            free = [axis for axis, size in enumerate(shape) if size is None]
            name = ".".join(filter(None, (path, "adapters.slot", tensor)))
            word = "length" if tensor in ("key", "value") else (words or {}).get(tensor, tensor[:-1] + "rank")
            dim = f"{path}.{word}" if free else None
            self.input(name, dtype, [dim if extent is None else extent for extent in shape])
            if default == "base" or not self.required:
                self.defaults[name] = value.astype(onnx.helper.tensor_dtype_to_np_dtype(ELEMENTS[dtype]))
            self.slots.append({"name": name, "site": path, "module": module, "rule": rule, "tensor": tensor,
                               "shape": shape, "free": free, "dim": dim, "dtype": dtype,
                               "default": default})  # fmt: skip
            named[tensor] = name
        entry = {"site": path, "rule": rule, "module": module, "slots": list(named.values()), **further}
        if by is not None:
            entry["by"] = len(self.rules)
            self.rules.append(by)
        self.sites.append(entry)
        return named

    def linear(self, x: str, path: str, weight: np.ndarray, bias: np.ndarray | None = None, **slots: Any) -> str:
        """gain ⊙ (W x + B A x) + b + B_bias, with slots of these names; none: W x + b."""
        out, size = weight.shape
        y = self.node("MatMul", x, self.node("Transpose", self.weight(f"{path}.weight", weight), perm=[1, 0]))
        if slots:
            slot_shapes = {"A": [None, size], "B": [out, None]}
            slot_shapes |= {"gain": ([out], "float32", "ones")} if slots.get("gain") else {}  # type: ignore[dict-item]
            slot_shapes |= {"B_bias": [out]} if slots.get("b_bias") else {}
            named = self.site(path, "lora", slot_shapes)
            down = self.node("MatMul", x, self.node("Transpose", named["A"], perm=[1, 0]))
            branch = self.node("MatMul", down, self.node("Transpose", named["B"], perm=[1, 0]))
            branch = self.node("Add", branch, named["B_bias"]) if "B_bias" in named else branch
            y = self.node("Add", y, branch)
            y = self.node("Mul", y, named["gain"]) if "gain" in named else y
        return y if bias is None else self.node("Add", y, self.weight(f"{path}.bias", bias))

    def manifest(self) -> dict[str, Any]:
        slots = {slot["name"] for slot in self.slots}
        return {
            "format": "model-surgery/onnx", "version": 1, "adapters": "slots" if slots else "merged",
            "slots_as": "inputs" if self.required else "overridable", "empty": self.empty, "slot": "slot",
            "slots": self.slots, "sites": self.sites, "rules": self.rules, "base": self.base, "opset": 20,
            "inputs": [value.name for value in self.inputs if value.name not in slots],
            "outputs": [value.name for value in self.outputs], "cache": self.cache, "versions": {},
        }  # fmt: skip

    def save(self, path: Path) -> Path:
        arrays = {**self.weights, **self.defaults}
        tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        graph = helper.make_graph(self.nodes, "main", self.inputs, self.outputs, tensors)
        for name in self.turned:
            info = graph.value_info.add(name=name)
            info.metadata_props.add(key="surgery.layout", value="transposed")
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        model.metadata_props.add(key="surgery.manifest", value=json.dumps(self.manifest()))
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# A net of two linear maps -----------------------------------------------------------------------------------------

W1, B1, W2, B2 = random(1, 6, 4), random(2, 6), random(3, 3, 6), random(4, 3)


def net(path: Path, required: bool = False, empty: str = "rank0", **slots: Any) -> Path:
    """relu(first x) second; both layers have slots with separate ranks."""
    build = Build(required, empty)
    x = build.input("x", "float32", ["batch", 4])
    y = build.linear(x, "first", W1, B1, slots=True, **slots)
    y = build.linear(build.node("Relu", y), "second", W2, B2, slots=True)
    build.output(y, "y", "float32", ["batch", 3])
    return build.save(path)


def net_in_numpy(x: np.ndarray, adapter: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    def delta(path: str, like: np.ndarray) -> Any:
        A, B = (adapter or {}).get(slot(path, "A")), (adapter or {}).get(slot(path, "B"))
        return np.zeros_like(like) if A is None or B is None else B @ A

    y = np.maximum(x @ (W1 + delta("first", W1)).T + B1, 0)
    return y @ (W2 + delta("second", W2)).T + B2


def slot(path: str, tensor: str) -> str:
    return f"{path}.adapters.slot.{tensor}"


def adapter(seed: int, first: int | None = 2, second: int | None = 3) -> Arrays:
    """Tensors for the net with these ranks; None: no tensors for this site."""
    arrays = {}
    for path, rank, (out, size) in (("first", first, W1.shape), ("second", second, W2.shape)):
        if rank is not None:
            arrays[slot(path, "A")] = random(seed, rank, size)
            arrays[slot(path, "B")] = random(seed + 1, out, rank)
    return arrays


def identities(path: Path, build: Build) -> Path:
    """A file that returns the tensors in its slots."""
    build.input("x", "float32", [1])
    build.output("x", "same", "float32", [1])
    for entry in build.slots:
        shape = [f"{entry['name']}_{axis}" if size is None else size for axis, size in enumerate(entry["shape"])]
        build.output(entry["name"], f"out:{entry['name']}", entry["dtype"], shape)
    return build.save(path)


def manifest_of(path: Path) -> Manifest:
    return Manifest.read(path)


# A decoder --------------------------------------------------------------------------------------------------------

VOCABULARY, SIZE, LONGEST = 13, 8, 32
EMBED, PLACE = random(11, VOCABULARY, SIZE), 2 * random(12, LONGEST, SIZE)
QUERY, KEY, VALUE, OUT = (random(seed, SIZE, SIZE) for seed in (13, 14, 15, 16))


def decoder(
    path: Path, cached: bool = True, required: bool = False, positions: bool = True, masked: bool = True,
    counted: bool = True,
) -> Path:  # fmt: skip
    """One attention over the text, and the embedding as its head; `positions` and `masked` are inputs of the file.

    `counted`: without the input position_ids, positions count from the first column, padding included;
    False: the file does not use positions.
    """
    build = Build(required)
    ids = build.input("input_ids", "int64", ["batch", "sequence"])
    total = "sequence" if not cached else "total"
    mask = build.input("attention_mask", "int64", ["batch", total]) if masked else None
    past_names = [f"past_key_values.0.{name}" for name in ("key", "value") if cached]
    past = [build.input(name, "float32", ["batch", 1, "past", SIZE]) for name in past_names]
    length = build.node("Shape", ids, start=1, end=2)
    before = build.node("Shape", past[0], start=2, end=3) if cached else build.number([0])
    one, zero = build.number(np.int64(1)), build.number(np.int64(0))
    end = build.node("Squeeze", build.node("Add", before, length))
    queries = build.node("Range", build.node("Squeeze", before), end, one)
    x = build.node("Gather", build.weight("embed.weight", EMBED), ids)
    if positions or counted:
        at = build.input("position_ids", "int64", ["batch", "sequence"]) if positions else queries
        x = build.node("Add", x, build.node("Gather", build.weight("place.weight", PLACE), at))
    q = build.node("Unsqueeze", build.linear(x, "query", QUERY, slots=True), build.number([1]))
    k = build.node("Unsqueeze", build.linear(x, "key", KEY), build.number([1]))
    v = build.node("Unsqueeze", build.linear(x, "value", VALUE, slots=True), build.number([1]))
    if cached:
        k, v = build.node("Concat", past[0], k, axis=2), build.node("Concat", past[1], v, axis=2)
        for name, value in (("key", k), ("value", v)):
            build.output(value, f"present.0.{name}", "float32", ["batch", 1, "total", SIZE])
            build.cache.append({"past": f"past_key_values.0.{name}", "present": f"present.0.{name}"})
    scores = build.node("MatMul", q, build.node("Transpose", k, perm=[0, 1, 3, 2]))
    scores = build.node("Div", scores, build.number(np.float32(np.sqrt(SIZE))))
    keys = build.node("Unsqueeze", build.node("Range", zero, end, one), build.number([0]))
    seen = build.node("LessOrEqual", keys, build.node("Unsqueeze", queries, build.number([1])))
    seen = build.node("Unsqueeze", seen, build.number([0, 1]))
    if mask is not None:
        unmasked = build.node("Unsqueeze", build.node("Cast", mask, to=TensorProto.BOOL), build.number([1, 2]))
        seen = build.node("And", seen, unmasked)
    scores = build.node("Where", seen, scores, build.number(np.float32(-1e9)))
    context = build.node("MatMul", build.node("Softmax", scores, axis=-1), v)
    x = build.node("Add", x, build.linear(build.node("Squeeze", context, build.number([1])), "out", OUT))
    logits = build.node("MatMul", x, build.node("Transpose", "embed.weight", perm=[1, 0]))
    build.output(logits, "logits", "float32", ["batch", "sequence", VOCABULARY])
    return build.save(path)


def decoder_in_numpy(
    ids: Sequence[int], adapter: Mapping[str, np.ndarray] | None = None, placed: bool = True
) -> np.ndarray:
    """The logits after each token of one text, without padding."""

    def map_(x: np.ndarray, path: str, weight: np.ndarray) -> np.ndarray:
        A, B = (adapter or {}).get(slot(path, "A")), (adapter or {}).get(slot(path, "B"))
        return x @ (weight if A is None or B is None else weight + B @ A).T

    x = EMBED[list(ids)] + (PLACE[: len(ids)] if placed else 0)
    scores = map_(x, "query", QUERY) @ map_(x, "key", KEY).T / np.sqrt(SIZE)
    scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (x + weights @ map_(x, "value", VALUE) @ OUT.T) @ EMBED.T


def greedy_in_numpy(ids: Sequence[int], count: int, adapter: Any = None, placed: bool = True) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(int(decoder_in_numpy(text, adapter, placed)[-1].argmax()))
    return text


def decoder_adapter(seed: int, query: int = 2, value: int = 3) -> Arrays:
    shapes = {("query", "A"): (query, SIZE), ("query", "B"): (SIZE, query)}
    shapes |= {("value", "A"): (value, SIZE), ("value", "B"): (SIZE, value)}
    return {slot(*name): random(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
