"""Traced graphs have the bits of their forward, also in other calls, or tracing fails with the line in the error."""

from __future__ import annotations

import copy
import io
import os
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SurgeryError, TraceError, apply_rules, coverage, trace
from surgery.testing import Snapshot
from surgery.tracing.example_call import equal, observe
from surgery.tracing.trace import traced
from surgery.transaction.object_contents import copied
from tests.support.families import FAMILIES
from tests.support.others import OTHERS, silero, silero_compiled

SAMPLE = ("bert", "llama", "gpt2", "t5", "vit", "mixtral", "whisper", "clip", "deberta_v2", "swin", "mamba", "convnext")
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else [name for name in SAMPLE if name in FAMILIES]


class Block(nn.Module):
    """A module like those of transformers: it has sizes, settings, optional arguments and a child called twice."""

    def __init__(self, heads: int = 2):
        super().__init__()
        self.proj, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.heads, self.p = heads, 0.25
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, twice: bool = False, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        b, n, _ = x.shape
        q, k, v = (part.view(b, n, self.heads, -1).transpose(1, 2) for part in self.proj(self.norm(x)).chunk(3, -1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :n], torch.finfo(x.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.p, self.training)
        y = self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))
        if twice:
            y = self.out(y)
        y *= self.scale
        y[:, 0] += 1
        for extra in more.get("extras", ()):
            y = y + extra
        return x + y, weights if more.get("with_weights") else None


def same(module: nn.Module, graph: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Check that the graph has the forward's bits from the same random state, and changes its arguments alike."""
    argument_copies = [(copied(args), copied(kwargs)) for _ in range(2)]
    results = []
    for run, (positional, named) in zip((graph, module), argument_copies, strict=True):
        torch.manual_seed(1)
        results.append(run(*positional, **named))
    assert equal(copied(results[0]), copied(results[1]))
    assert equal(copied(argument_copies[0]), copied(argument_copies[1]))


CALLS: list[dict[str, Any]] = [
    {},
    {"mask": torch.tensor([[True, True, False], [True, False, False]])},
    {"twice": True},
    {"with_weights": True, "extras": [torch.ones(8), torch.zeros(2, 3, 8)]},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_bits_on_the_example_and_on_other_sizes(call: int, training: bool) -> None:
    block, kwargs = Block().train(training), CALLS[call]
    graph = trace(block, {"x": torch.randn(2, 3, 8), **kwargs})
    same(block, graph, torch.randn(2, 3, 8), **kwargs)
    if "extras" not in kwargs:
        wide = {key: value.repeat(2, 2) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        same(block, graph, torch.randn(4, 6, 8), **wide)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"].count("out") == 1 + (call == 2)


def test_gradients_are_the_forwards() -> None:
    block, x = Block(), torch.randn(2, 3, 8, requires_grad=True)
    graph = trace(block.eval(), x)
    inputs = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x)[0].square().sum(), inputs)
    results = torch.autograd.grad(graph(x)[0].square().sum(), inputs)
    assert all(torch.equal(gradient, other) for gradient, other in zip(expected, results, strict=True))


def test_buffers_that_are_not_saved_stay_so() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean.type_as(x)
            return x - self.mean

    module = Held()
    before = Snapshot(module)
    coverage(module, torch.randn(2, 3))
    assert not before.differences(module) and not module.state_dict()


def test_another_kind_of_call_is_told() -> None:
    block = Block().eval()
    graph = trace(block, torch.randn(2, 3, 8))
    x = torch.randn(2, 3, 8)
    with pytest.raises(TraceError, match="mask as None"):
        graph(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TraceError, match="twice as False"):
        graph(x, twice=True)
    with pytest.raises(TraceError, match="float64"):
        graph(x.double())
    with pytest.raises(TraceError, match="rank 3"):
        graph(x[0])
    block.p = 0.5
    with pytest.raises(TraceError, match=r"p was 0\.25"):
        graph(x)
    block.p = 0.25
    block.train()
    with pytest.raises(TraceError, match="training was False"):
        graph(x)
    block.eval()
    block.heads = 4  # the graph reads a number again at each call if the forward only computes with it
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TraceError, match="autocast"):
        graph(x)


def test_a_decision_on_a_size_is_checked_at_each_call() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 4:
                return x[:, : x.shape[1] // 2]
            for _ in range(x.size(0)):
                x = x + 1
            return x

    module = Long()
    graph = trace(module, torch.randn(2, 6))
    same(module, graph, torch.randn(7, 9))
    with pytest.raises(TraceError, match="True is decided") as raised:
        graph(torch.randn(2, 3))
    assert "test_trace.py" in str(raised.value)
    graph = trace(module, torch.randn(2, 3))
    same(module, graph, torch.randn(2, 4))
    with pytest.raises(TraceError, match="2 is decided"):
        graph(torch.randn(3, 3))


def test_sizes_and_strides_of_all_kinds_stay_computed() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor, shape: torch.Size) -> Tensor:
            size, stride = list(x.size()), list(x.stride())
            rows = x.as_strided([size[0], size[1] - 1, 2], [stride[0], stride[1], stride[1]])
            y: Any = torch.ones(shape).sum() + x.storage_offset() + x.numel()
            return rows + y if x.is_contiguous() else rows * y

    module, x = Sizes(), torch.randn(2, 3)
    graph = trace(module, (x, x.shape))
    for other in (torch.randn(4, 6), torch.randn(1, 9)):
        same(module, graph, other, other.shape)
    with pytest.raises(TraceError, match="is decided"):
        graph(torch.randn(3, 2).t(), x.shape)


def test_nothing_is_left_behind() -> None:
    module = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), Block()).train()
    x = torch.randn(4, 8, 8)
    before, state, random_state = Snapshot(module), torch.get_rng_state(), random.getstate()
    coverage(module, x)
    trace(module, x)
    assert before.differences(module) == []
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == random_state


def test_settings_of_held_objects_are_checked_and_their_numbers_stay_free() -> None:
    class Config:
        kind, width, scale, deep = "wide", 3, 0.5, None

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.index = 1

        def forward(self, x: Tensor) -> Tensor:
            if self.config.kind == "wide" and self.config.deep is None:
                return x[..., : self.config.width] * self.config.scale + self.index
            return x

    module = Reads()
    graph = trace(module, torch.randn(2, 6))
    same(module, graph, torch.randn(2, 6))
    module.config.width = 5
    same(module, graph, torch.randn(2, 6))
    module.config.kind = "narrow"
    with pytest.raises(TraceError, match=r"config\.kind was 'wide'"):
        graph(torch.randn(2, 6))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Result:
    value: Tensor
    rest: Tensor | None = None


class Holder:
    """A cache as models pass it from layer to layer."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.length = 0

    def update(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        self.length += x.shape[1]
        return torch.cat(self.tensors, 1)


def test_outputs_of_any_shape() -> None:
    class Outputs(nn.Module):
        def __init__(self, kind: str):
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor) -> Any:
            if self.kind == "pair":
                return Pair(x + 1, x * 2)
            if self.kind == "dataclass":
                return Result(value=x + 1)
            if self.kind == "dict":
                return {"a": x, "b": [x + 1, None], "c": OrderedDict(d=x)}
            if self.kind == "numbers":
                return x.shape[0] * 2, x.shape, x.dim()
            return torch.return_types.max((x, x)) if self.kind == "torch" else x.max(-1)

    for kind in ("pair", "dataclass", "dict", "numbers", "max"):
        module = Outputs(kind)
        graph = trace(module, torch.randn(2, 3))
        same(module, graph, torch.randn(4, 5))


def test_objects_that_are_handed_in_and_made() -> None:
    class Caches(nn.Module):
        def forward(self, x: Tensor, cache: Holder | None = None) -> tuple[Tensor, Holder]:
            if cache is None:
                cache = Holder()
                return self.attend(x, cache), cache
            offset = cache.length
            return self.attend(x + offset, cache), cache

        def attend(self, x: Tensor, cache: Holder) -> Tensor:
            return cache.update(x).cumsum(1)

    module, x = Caches(), torch.randn(2, 3)
    cache = Holder()
    cache.update(torch.randn(2, 4))
    graph = trace(module, {"x": x, "cache": cache})
    assert len(cache.tensors) == 1
    same(module, graph, x, cache=cache)
    longer = copy.deepcopy(cache)
    longer.update(torch.randn(2, 2))
    same(module, graph, torch.randn(2, 5), cache=longer)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Caches(), Caches()

        def forward(self, x: Tensor) -> tuple[Tensor, Holder]:
            cache = Holder()
            y, _ = self.first(x, cache=cache)
            y, _ = self.second(y, cache=cache)
            return y, cache

    root = Root()
    graph = trace(root, x)
    for _ in range(2):  # each call creates its own cache
        same(root, graph, torch.randn(2, 3))


def test_own_gradient_and_autocast_regions() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                fixed = x @ self.weight
            with torch.autocast("cpu", enabled=False):
                precise = x @ self.weight
            return fixed * x, precise

    module, x = Regions(), torch.randn(3, 4, requires_grad=True)
    graph = trace(module, x)
    for actual, other in zip(graph(x), module(x), strict=True):
        assert torch.equal(actual, other)
    inputs = [x, module.weight]
    for index in (0, 1):
        grads = [torch.autograd.grad(run(x)[index].sum(), inputs, allow_unused=True) for run in (graph, module)]
        assert equal(*(tuple(copied(grad) for grad in results) for results in grads))
    with torch.no_grad():
        graph = trace(module, x)
    assert graph(x)[1].requires_grad and torch.equal(graph(x)[0], module(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        graph = trace(module, x)
        results, expected = graph(x), module(x)
    assert expected[0].dtype is torch.float32 and expected[1].dtype is torch.float32
    assert all(torch.equal(actual, other) for actual, other in zip(results, expected, strict=True))


OUTSIDE = torch.ones(4)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


class Refused(nn.Module):
    def __init__(self, case: str):
        super().__init__()
        self.case = case
        self.seen = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        case = self.case
        if case == "item":
            return x * x.sum().item()
        if case == "branch":
            return x if x.sum() > 0 else -x
        if case == "mask size":
            return x.new_zeros(x[x > 0].shape[0] + 1) if x[x > 0].shape[0] > 1 else x
        if case == "loop":
            for index in (x > 0).nonzero():
                x = x + index.sum()
            return x
        if case == "tolist":
            return x * len(x.tolist())
        if case == "state":
            self.seen = x.shape[0]
            return x
        if case == "buffer":
            self.count = self.count + 1
            return x * self.count
        if case == "outside":
            return x + OUTSIDE
        if case == "numpy":
            return x + torch.from_numpy(x.detach().numpy())
        if case == "python random":
            return x * random.random()
        if case == "numpy random":
            return x * float(np.random.rand())
        if case == "autograd function":
            return Doubled.apply(x)
        if case == "itself":
            return x if x.dim() > 1 else self(x[None])
        return torch.Tensor([1.0]) + x


HOWS = {
    "item": r"content of a tensor \(item\)",
    "branch": r"content of a tensor \(bool\)",
    "mask size": "a size that depends on the content",
    "loop": "whose size depends on the content",
    "tolist": r"content of a tensor \(tolist\)",
    "state": "sets seen on the module",
    "buffer": "sets count on the module",
    "outside": "comes from nowhere",
    "numpy": r"content of a tensor \(numpy\)",
    "python random": "random numbers outside of torch",
    "numpy random": "random numbers outside of torch",
    "autograd function": "autograd function of its own",
    "itself": "calls the module itself",
    "constructor": "comes from nowhere",
}


@pytest.mark.parametrize("case", HOWS)
def test_what_a_graph_would_get_wrong_is_refused_with_its_line(case: str) -> None:
    module = Refused(case)
    before = Snapshot(module)
    with pytest.raises(TraceError, match=HOWS[case]) as raised:
        trace(module, torch.tensor([1.0, 2.0, -1.0, 3.0]))
    assert before.differences(module) == [] and module.seen == 0
    if "random" not in case:
        assert raised.value.where and "test_trace.py" in raised.value.where
    parent = nn.Sequential(nn.Identity(), module)
    if case not in ("itself", "autograd function"):  # without gradients, the graph does not lose a backward
        rows = {row.type: row for row in coverage(parent, torch.ones(4)).rows}
        assert rows["Refused"].status == "refused" and rows["Sequential"].status == "equal"


def test_a_decision_on_a_mask_is_one_on_the_kind_of_call() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x if mask.all() else x * mask

    module, x = Masked(), torch.randn(2, 3)
    full, part = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False], [True, True, True]])
    for mask, other in ((full, part), (part, full)):
        graph = trace(module, (x, mask))
        same(module, graph, x, mask)
        with pytest.raises(TraceError, match="is decided"):
            graph(x, other)


def test_the_dtype_that_a_forward_goes_by_is_checked() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return x.masked_fill(x > 0, torch.finfo(x.dtype).min)

    module = Filled()
    graph = trace(module, torch.tensor([1, 2]))
    same(module, graph, torch.tensor([3, 1, 1]))
    module.bfloat16()
    with pytest.raises(TraceError, match="float32 is found, and this one gives a tensor of rank 2 and torch.bfloat16"):
        graph(torch.tensor([1, 2]))


def test_a_check_of_all_of_a_tensor_is_one_in_the_graph() -> None:
    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check_tensor_all(x * 2 >= 0, lambda: "negative")
            return x + 1

    module = Checked()
    graph = trace(module, torch.ones(3))
    same(module, graph, torch.rand(5))
    with pytest.raises(TraceError, match="True is decided"):
        graph(-torch.ones(3))


def test_a_function_from_a_registry_is_one_node() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=20, intermediate_size=16, **sizes)
    for kind in ("sdpa", "eager"):
        config._attn_implementation = kind
        model = transformers.LlamaModel(config).eval()
        attention = model.layers[0].self_attn
        observation = observe(model, {"input_ids": torch.tensor([[1, 2, 3]])}, [attention])
        graph = traced(attention, *observation.calls[id(attention)][:2])
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        names = [getattr(target, "__name__", "") for target in targets]
        assert f"{kind}_attention_forward" in names and "scaled_dot_product_attention" not in names
        expected = ALL_ATTENTION_FUNCTIONS.get(kind)
        assert expected is None or expected in targets


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_attention_with_masks_and_caches(side: str, cached: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=20, intermediate_size=16, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 20, (2, 5))
    mask = None
    if side != "none":
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        mask = mask.flip(1) if side == "right" else mask
    past = None
    if cached:
        past = transformers.DynamicCache(config=config)
        model(ids, attention_mask=mask, past_key_values=past)
        ids = ids[:, -1:]
        mask = None if mask is None else torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": past}
    with torch.no_grad():
        watched = [module for module in model.modules() if "Attention" in type(module).__name__]
        for module, call in observe(model, copied(inputs), watched).calls.items():
            table = next(candidate for candidate in watched if id(candidate) == module)
            graph = traced(table, call[0], call[1])
            same(table, graph, *call[0], **call[1])
        assert coverage(model, copied(inputs)).equal_share == 1.0


class Notes:
    """A cache that stores its inputs in a list, in dicts, and by layer index."""

    def __init__(self, count: int = 0, **done: Any) -> None:
        torch.manual_seed(count)
        self.tensors = [torch.randn(2, 3) for _ in range(count)]
        self.done: dict[Any, Any] = dict(done)
        if count > 1:
            self.more = True
        self.pair: tuple[Tensor, Tensor | None] = (torch.ones(3), torch.zeros(3) if count > 1 else None)

    def full(self) -> bool:
        return len(self.tensors) > 1

    def last(self) -> Tensor | None:
        return self.tensors[-1] if self.full() else None


def _counted(x: Tensor, notes: Notes) -> Tensor:
    notes.done["n"] = notes.done.get("n", 0) + x.shape[0]
    return x * notes.done["n"]


def _marked(x: Tensor, notes: Notes) -> Tensor:
    was = notes.done.get("seen")
    notes.done["seen"] = True
    return x * 2 if was else x + notes.done["seen"]


def _through_other_names(x: Tensor, notes: Notes) -> Tensor:
    tensors, done = notes.tensors, notes.done
    tensors.append(x)
    done["also"] = tensors
    tensors.append(x + 1)
    return torch.cat(done["also"])


def _appended(x: Tensor, notes: Notes) -> Tensor:
    notes.tensors.append(x)
    notes.tensors += [x + 1]
    return torch.stack(notes.tensors) + notes.tensors[-1]


def _replaced(x: Tensor, notes: Notes) -> Tensor:
    for index, tensor in enumerate(notes.tensors):
        notes.tensors[index] = tensor + x
    return notes.tensors[0]


def _filled(x: Tensor, notes: Notes) -> Tensor:
    if "key" not in notes.done:
        notes.done["key"] = x
    return notes.done["key"] + notes.done.setdefault("other", x + 1)


def _dropped(x: Tensor, notes: Notes) -> Tensor:
    del notes.done["n"]
    return x + notes.tensors.pop(0)


def _gone_through(x: Tensor, notes: Notes) -> Tensor:
    for key, value in notes.done.items():
        x = x + value if key == "n" else x - value
    return x


# The use of a cache; the cache in the traced call, in another call of the same kind, and in a call of another kind.
WITH_NOTES: dict[str, tuple[Any, Notes, Notes | None, Notes | None]] = {
    "counted": (_counted, Notes(), Notes(n=5), None),
    "marked": (_marked, Notes(), Notes(other=1), Notes(seen=True)),
    "marked again": (_marked, Notes(seen=True), Notes(seen=True, n=1), Notes(seen=False)),
    "through other names": (_through_other_names, Notes(1), Notes(3), None),
    "appended": (_appended, Notes(1), Notes(2), None),
    "replaced": (_replaced, Notes(2), None, Notes(3)),
    "filled": (_filled, Notes(), Notes(n=1), Notes(key=torch.ones(3))),
    "dropped": (_dropped, Notes(1, n=1), Notes(2, n=3, m=1), None),
    "gone through": (_gone_through, Notes(n=1), Notes(n=2), Notes(m=2)),
    "concatenated": (lambda x, notes: torch.cat(notes.tensors) + x.sum(), Notes(1), Notes(3), None),
    "unpacked": (lambda x, notes: torch.cat([x, *notes.tensors]), Notes(1), None, Notes(2)),
    "added": (lambda x, notes: torch.cat([x] + notes.tensors), Notes(1), None, Notes(2)),
    "sliced": (lambda x, notes: torch.cat(notes.tensors[1:]), Notes(2), Notes(3), None),
    "asked": (lambda x, notes: x if notes.full() else -x, Notes(1), Notes(0), Notes(2)),
    "none or not": (lambda x, notes: x if notes.last() is None else -x, Notes(1), Notes(0), Notes(2)),
    "missing": (lambda x, notes: x if hasattr(notes, "more") else -x, Notes(1), Notes(0), Notes(2)),
    "a pair": (lambda x, notes: x if notes.pair[1] is None else -x, Notes(1), Notes(0), Notes(2)),
}


@pytest.mark.parametrize("name", WITH_NOTES)
def test_what_is_written_to_and_read_from_an_argument(name: str) -> None:
    does, notes, like, unlike = WITH_NOTES[name]

    class Uses(nn.Module):
        def forward(self, x: Tensor, notes: Notes) -> Tensor:
            return does(x, notes)

    module, x = Uses(), torch.randn(2, 3)
    before = copied(notes)
    graph = trace(module, (x, notes))
    assert equal(before, notes)
    same(module, graph, x, notes)
    if like is not None:
        same(module, graph, torch.randn(2, 3), like)
    if unlike is not None:
        with pytest.raises(TraceError, match="this graph is for calls where"):
            graph(x, copied(unlike))


@pytest.mark.parametrize("where", ["its object", "its object's tensors", "itself", "its layers", "then fails"])
def test_what_is_written_to_a_held_object_is_refused(where: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.notes = Notes(1)
            self.done = {"n": 0}
            self.layers: list[Any] = [nn.Identity()]

        def forward(self, x: Tensor) -> Tensor:
            if where == "its object":
                self.notes.done["n"] = x.shape[0]
            elif where == "its object's tensors":
                self.notes.tensors.append(x)
            elif where == "its layers":
                self.layers.append(x)
            else:
                self.done["n"] = 5
            return x if where != "then fails" or x.sum() > 0 else -x

    module = Counts()
    with pytest.raises(
        TraceError, match="changes (notes.tensors|notes.done|done|layers) of the module|content of a tensor"
    ):
        trace(module, torch.randn(2, 3))
    assert not module.notes.done and len(module.notes.tensors) == 1 and module.done == {"n": 0}
    assert len(module.layers) == 1


def test_what_a_child_gives_is_checked() -> None:
    class Weighs(nn.Module):
        with_weights = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return x + 1, x.softmax(-1) if self.with_weights else None

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Weighs()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.child(x)

    module, x = Parent(), torch.randn(2, 3)
    graph = trace(module, x)
    same(module, graph, torch.randn(4, 5))
    module.child.with_weights = True
    with pytest.raises(TraceError, match="this graph is for calls where"):
        graph(x)


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus", "whisper"])
def test_cross_attention_fills_its_cache_once(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    first = {**inputs, "use_cache": True, "past_key_values": transformers.EncoderDecoderCache(*caches)}
    filled = copied(first)
    with torch.no_grad():
        model(**filled)
    second = {**filled, "decoder_input_ids": inputs["decoder_input_ids"][:, -1:]}
    named = [module for module in model.modules() if "Attention" in type(module).__name__]
    attentions = [module for module in named if not any(inner in named for inner in module.children())]
    steps = [observe(model, copied(step), attentions) for step in (first, second)]
    crossed = 0
    for module in attentions:
        if not steps[0].reached(module):
            continue
        calls = [step.calls[id(module)][:2] for step in steps if step.reached(module)]
        graphs = [traced(module, *call) for call in calls]
        for graph, (args, kwargs) in zip(graphs, calls, strict=True):
            same(module, graph, *args, **kwargs)
        if kwargs.get("key_value_states") is not None and kwargs.get("past_key_values") is not None:
            crossed += 1
            for graph, (args, kwargs) in zip(graphs, reversed(calls), strict=True):
                with pytest.raises(TraceError, match="is found, and this one gives"):
                    graph(*copied(args), **copied(kwargs))
    assert crossed == 2
    assert coverage(model, copied(first)).equal_share == coverage(model, copied(second)).equal_share == 1.0


@pytest.mark.parametrize("names", [["layer", "other"], ["other", "layer"]])
def test_coverage_tries_each_way_in_which_a_class_is_used(names: list[str]) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x if context is None else x * context.sum().item()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: Layer() for name in names})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["other"](self.layers["layer"](x), x)

    rows = {row.type: row for row in coverage(Model(), torch.randn(2, 3)).rows}
    assert (rows["Layer"].status, rows["Layer"].path) == ("refused", "layers.other") and rows["Model"].status == "equal"


def test_a_rewritten_module_is_traced_with_its_adapters() -> None:
    from surgery.rules import LoraRule

    block = Block().eval()
    apply_rules(block, [LoraRule(["proj", "out"], rank=2, init="random")])
    x = torch.randn(2, 3, 8)
    same(block, trace(block, x), x)


@pytest.mark.filterwarnings("ignore")  # warnings of the packages
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str) -> None:
    try:
        model, inputs = OTHERS[name]()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    for mode in (False, True):
        table = coverage(model.train(mode), inputs)
        assert table.rows and table.equal_share == 1.0, str(table)


@pytest.mark.filterwarnings("ignore")  # a warning of torch.jit, which is deprecated
def test_a_compiled_module_is_refused() -> None:
    compiled = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(2, 4)
    with pytest.raises(TraceError, match="TorchScript"):
        trace(compiled, x)
    (row,) = coverage(compiled, x).rows
    assert row.status == "refused" and "is compiled and does not have a Python forward" in row.reason
    model = nn.Sequential(nn.Linear(4, 4), compiled, nn.Tanh())
    rows = {row.type: row for row in coverage(model, x).rows}
    assert {name: row.status for name, row in rows.items()} == {
        "Sequential": "refused",
        "Linear": "equal",
        "RecursiveScriptModule": "refused",
        "Tanh": "equal",
    }
    assert "calls 1, a TorchScript module" in rows["Sequential"].reason


@pytest.mark.filterwarnings("ignore")
def test_silero_vad() -> None:
    try:
        (compiled, inputs), (model, (x, state)) = silero_compiled(), silero()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert coverage(compiled, inputs).equal_share == 0.0
    for table, expected in zip(model(x, state), compiled._model(x, state), strict=True):
        torch.testing.assert_close(table, expected)
    same(model, trace(model, (x, state)), x[:1], state[:, :1])


def test_a_rewritten_module_by_itself_is_refused() -> None:
    from surgery.rules import LoraRule

    block = apply_rules(Block().eval(), [LoraRule("proj", rank=2, init="random")])
    x = torch.randn(2, 3, 8)
    with pytest.raises(TraceError, match="rewritten by rules"):
        trace(block.proj, x)
    rows = {row.type: row.status for row in coverage(block, x).rows}
    assert rows["Linear"] == "refused" and rows["Block"] == "equal"


def test_the_table_prints() -> None:
    rich_console = pytest.importorskip("rich.console")
    table = coverage(nn.Sequential(nn.Linear(4, 4), Refused("branch")), torch.ones(2, 4))
    assert "2 of 3 module classes" in str(table) and "Refused" in str(table)
    console = rich_console.Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    assert "Refused" in console.export_text()


def test_bad_examples_are_told() -> None:
    with pytest.raises(SurgeryError):
        coverage(nn.Linear(4, 4), torch.ones(2, 5))
    for example in ({"nothing": torch.ones(2, 4)}, torch.ones(2, 5), ["text"]):
        with pytest.raises(SurgeryError, match="fails on the example"):
            trace(nn.Linear(4, 4), example)


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str) -> None:
    """In every family and mode, tracing fails or the graph has the forward's bits, also with other sizes."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make().eval()
    table = coverage(model, family.inputs())
    assert table.rows and table.equal_share >= 0.7
    assert all(row.reason for row in table.rows if row.status == "refused")
    if name in SAMPLE:
        assert table.equal_share == 1.0, str(table)


@pytest.mark.parametrize("name", NAMES)
def test_families_in_another_batch(name: str) -> None:
    """Trace with one batch and run with a batch twice as large: the bits are the forward's, or a guard raises."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, inputs = family.make().eval(), family.inputs()
    double = {key: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v for key, v in inputs.items()}
    modules = list({type(module): module for module in model.modules()}.values())
    observation = observe(model, inputs, modules)
    try:
        larger = observe(model, double, modules)
    except SurgeryError:
        pytest.skip("the model takes no other batch")
    same_bits = 0
    for module in modules:
        if not (observation.reached(module) and larger.reached(module)):
            continue
        with torch.no_grad():
            try:
                graph = traced(module, *observation.calls[id(module)][:2])
                args, kwargs, _ = larger.calls[id(module)]
                torch.manual_seed(1)
                results = graph(*copied(args), **copied(kwargs))
            except TraceError:
                continue
            torch.manual_seed(1)
            expected = type(module).forward(module, *copied(args), **copied(kwargs))
        assert equal(copied(results), copied(expected)), type(module).__name__
        same_bits += 1
    assert same_bits > 0
