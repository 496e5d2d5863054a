"""The source search finds exactly the reads of a parameter that bypass its module's forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from surgery import PlanError, apply_rules
from surgery.planning.direct_reads import bypasses, bypasses_of, fastpath_switch
from surgery.planning.read_search import ReadSearch
from surgery.rules import LoraRule


def list_bypassed(model: nn.Module) -> set[str]:
    return {f"{path}.{place.parameter}" for path, places in bypasses(model).items() for place in places}


class Base(nn.Module):
    lin: Any
    layers: Any
    named: Any
    inner: Any

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight


def width(tensor: Tensor) -> int:
    return tensor.shape[0]


class Argument(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight)


class Keyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.lin.weight, bias=self.lin.bias)


class Operand(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lin.weight.t()


class InPlaceOperand(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += self.lin.bias
        return x


class Returned(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin.weight


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        lin = self.lin
        weight = lin.weight.to(x.dtype)
        return F.linear(x, weight)


class Walrus(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + bias if (bias := self.lin.bias) is not None else x


class Pair(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight, size = self.lin.weight, x.shape
        return x @ weight + size[0]


class TupleUsed(Base):
    def forward(self, x: Tensor) -> Tensor:
        parameters = (self.lin.weight, self.lin.bias)
        return F.linear(x, *parameters)


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x @ layer.weight
        return x


class Enumerated(Base):
    def forward(self, x: Tensor) -> Tensor:
        for index, (layer, scale) in enumerate(zip(self.layers, (1.0, 2.0), strict=True)):
            x = x @ layer.weight * scale + index
        return x


class Items(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _name, layer in self.named.items():
            x = x + layer.bias
        return x


class Values(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + sum(layer.bias for layer in self.named.values())


class Comprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([layer.weight for layer in reversed(self.layers)]))


class FirstOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layers[0].weight + self.named["b"].bias


class AnyIndex(Base):
    def forward(self, x: Tensor, i: int = 0) -> Tensor:
        return x @ self.layers[i].weight


class Deep(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner[1].weight


class Getattr(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(getattr(self, "lin"), "weight")  # noqa: B009


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight)


class Super(Method):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SuperHelper(Method):
    def helper(self, x: Tensor) -> Tensor:
        return super().helper(x)


class Property(Base):
    @property
    def kernel(self) -> Tensor:
        return self.lin.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel)


class MethodResult(Base):
    def pick(self) -> nn.Linear:
        return self.lin

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.pick().weight)


class HandedOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.lin)


class HandedToMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, layer=self.lin)

    def use(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x @ layer.weight


class Decodes(nn.Module):
    """Perceiver's decoder gets its embedding as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor, table: Any) -> Tensor:
        return self.times(self.norm(x), table)

    def times(self, x: Tensor, table: Any) -> Tensor:
        return x @ table.weight.t()


class DecodesBelow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Decodes()

    def forward(self, x: Tensor, table: Any) -> Tensor:
        return self.inner(x, table)


class Times(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class HandedToChild(Base):
    def __init__(self) -> None:
        super().__init__()
        self.dec: Any = Decodes()

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(x, table=self.lin)


class HandedToChildByPosition(HandedToChild):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.inner[1]
        return self.dec.forward(x, layer)


class HandedToChildOfChild(HandedToChild):
    def __init__(self) -> None:
        super().__init__()
        self.dec = DecodesBelow()


class HandedItsWeight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.dec: Any = Times()

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(x, weight=self.lin.weight)


class MethodAsValue(Method):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.helper, x, use_reentrant=False)


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return y @ self.lin.weight

        return inner(x)


class Lambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        run = lambda y: y @ self.lin.weight  # noqa: E731
        return run(x)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lin.weight


class Attends(nn.Linear):
    def attend(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class ChildMethod(nn.Module):
    """A method of the child itself may bypass its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = Attends(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin.attend(x)


class SlicesItsList(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:1]:
            x = x @ layer.weight
        return x


READS = {
    Argument: {"lin.weight"},
    Keyword: {"lin.weight", "lin.bias"},
    Operand: {"lin.weight"},
    InPlaceOperand: {"lin.bias"},
    Returned: {"lin.weight"},
    Alias: {"lin.weight"},
    Walrus: {"lin.bias"},
    Pair: {"lin.weight"},
    TupleUsed: {"lin.weight", "lin.bias"},
    Loop: {"layers.0.weight", "layers.1.weight"},
    Enumerated: {"layers.0.weight", "layers.1.weight"},
    Items: {"named.a.bias", "named.b.bias"},
    Values: {"named.a.bias", "named.b.bias"},
    Comprehension: {"layers.0.weight", "layers.1.weight"},
    FirstOnly: {"layers.0.weight", "named.b.bias"},
    AnyIndex: {"layers.0.weight", "layers.1.weight"},
    Deep: {"inner.1.weight"},
    Getattr: {"lin.weight"},
    Method: {"lin.weight"},
    Super: {"lin.weight"},
    SuperHelper: {"lin.weight"},
    Property: {"lin.weight"},
    MethodResult: {"lin.weight"},
    HandedOn: {"lin.weight"},
    HandedToMethod: {"lin.weight"},
    HandedToChild: {"lin.weight"},
    HandedToChildByPosition: {"inner.1.weight"},
    HandedToChildOfChild: {"lin.weight"},
    HandedItsWeight: {"lin.weight"},
    MethodAsValue: {"lin.weight"},
    Nested: {"lin.weight"},
    Lambda: {"lin.weight"},
    Decorated: {"lin.weight"},
    ChildMethod: {"lin.weight"},
    SlicesItsList: {"layers.0.weight", "layers.1.weight"},  # the search does not evaluate slices
}


@pytest.mark.parametrize("kind", READS, ids=lambda kind: kind.__name__)
def test_reading_is_found(kind: type[nn.Module]) -> None:
    assert list_bypassed(kind()) == READS[kind]


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.lin(x))
        for layer in self.layers:
            x = layer(x)
        return self.named["a"].forward(x)


class AsksAbout(Base):
    """T5's feed-forward reads the dtype of a weight, as most models do somewhere."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lin.weight
        if isinstance(self.lin.weight, Tensor) and x.dtype != self.lin.weight.dtype and weight.dtype != torch.int8:
            x = x.to(self.lin.weight.dtype)
        size, count = self.lin.weight.size(0), self.lin.weight.shape[1] + weight.ndim + width(self.lin.weight)
        zeros = torch.zeros(size, count, device=self.lin.weight.device, dtype=weight.dtype)
        if self.lin.bias is not None and self.lin.weight.requires_grad and self.lin.weight.data_ptr() != 0:
            zeros = zeros + len(self.lin.weight) + self.lin.weight.new_zeros(1)
        if hasattr(self.lin, "weight") and self.lin.weight is not self.inner[0].weight:
            x = x.to(self.lin.weight)
        return self.lin(x) + zeros.sum()


class OwnOnly(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class NoParameter(Base):
    """Reading an attribute that is not a parameter is not a bypass, whatever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.free = nn.Linear(3, 3, bias=False)
        self.lin.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lin.scale + self.norm.running_mean + self.lin.in_features + (self.free.bias or 0)


class Unreached(Base):
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lin.weight)

    def tie_weights(self) -> None:
        self.lin.weight = self.inner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """F.linear(x, self.lin.weight) in a docstring is text."""
        return self.lin(x)


class Renamed(Base):
    """After a second assignment, a name no longer stands for the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        value = self.lin.weight
        dtype = value.dtype
        value = self.lin(x)
        return value.to(dtype) @ value


class Attention(nn.Linear):
    """An attention interface gets the module as an argument and reads the module's own parameters."""

    def forward(self, x: Tensor, *, module: Any, cache: Any = None) -> Tensor:
        return attend(self, F.linear(x, self.weight) + module.scale, cache) * module.weight.sum()


def attend(module: Any, x: Tensor, cache: Any) -> Tensor:
    return x * module.in_features + module.bias + (cache(x) if cache is not None else 0)


class HandsItself(Base):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.lin, x, use_reentrant=False)
        return self.attention(x, module=self, cache=self.lin)


class HandsToItself(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention: Any = Attention(3, 3)
        self.attention.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, module=self.attention, cache=self.inner)


NOTHING = [Calls, NoParameter, AsksAbout, Unreached, Renamed, HandsItself, HandsToItself]


@pytest.mark.parametrize("kind", NOTHING, ids=lambda kind: kind.__name__)
def test_nothing_is_found_where_forwards_are_called(kind: type[nn.Module]) -> None:
    assert bypasses(kind()) == {}


def test_own_parameters_are_no_bypass() -> None:
    assert bypasses(nn.Sequential(OwnOnly(2, 2), nn.LSTM(2, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1))) == {}


def test_place_names_file_line_and_source() -> None:
    model = nn.Sequential(Method())
    (place,) = bypasses(model)["0.lin"]
    lines, start = inspect.getsourcelines(Method.helper)
    assert (place.path, place.parameter, place.reader) == ("0.lin", "weight", "0")
    assert place.reader_type == f"{Method.__module__}.Method"
    assert (place.file, place.line) == (__file__, start + 1)
    assert place.source == lines[1].strip() == "return F.linear(x, self.lin.weight)"


def test_place_of_what_a_child_is_handed_is_in_the_child() -> None:
    model = nn.Sequential(HandedToChild())
    (place,) = bypasses(model)["0.lin"]
    lines, start = inspect.getsourcelines(Decodes.times)
    assert (place.reader, place.file, place.line) == ("0.dec", __file__, start + 1)
    assert place.source == lines[1].strip() and not place.conditional
    with pytest.raises(PlanError) as caught:
        apply_rules(model, [LoraRule("lin", rank=2)])
    assert f"Decodes reads its weight directly, at {__file__}:{place.line}" in str(caught.value)


class Branches(Base):
    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        if fused:
            return F.linear(x, self.lin.weight)
        x = x @ self.layers[0].weight if fused else x + self.layers[0].weight.sum()
        if fused:
            x = x @ self.layers[1].weight
        else:
            x = self.helper(x) + x @ self.layers[1].weight
        return self.lin(x)

    def helper(self, x: Tensor) -> Tensor:
        return x @ self.inner[0].weight


def test_conditional_is_what_some_call_never_reads() -> None:
    never = {path: all(place.conditional for place in places) for path, places in bypasses(Branches()).items()}
    assert never == {"lin": True, "layers.0": False, "layers.1": False, "inner.0": True}


def test_of_one_path_is_the_same_as_of_all() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 2)
    for model in (nn.Sequential(*(kind() for kind in READS)), encoder):
        every = bypasses(model)
        for path, _ in model.named_modules():
            assert set(bypasses_of(model, path)) == set(every.get(path, []))
    with pytest.raises(AttributeError):
        bypasses_of(encoder, "layers.7")


def test_of_a_shared_module_takes_its_other_paths() -> None:
    model = nn.Sequential(Calls(), Argument())
    model[1].lin = model[0].lin
    every = bypasses(model)
    assert list(every) == ["0.lin"] and every["0.lin"][0].reader == "1"
    assert bypasses_of(model, "0.lin") == []
    assert bypasses_of(model, "0.lin", ["1.lin"]) == every["0.lin"]


def test_quick_look_at_the_class_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(kind() for kind in READS), nn.TransformerEncoderLayer(4, 2), Branches())
    quick = bypasses(model)
    monkeypatch.setattr(ReadSearch, "promising", lambda self: True)
    assert bypasses(model) == quick


def test_unregistered_reference_is_followed_where_the_model_has_the_module() -> None:
    model = nn.Sequential(Calls(), Calls())

    class Reader(nn.Module):
        def __init__(self, lin: Any) -> None:
            super().__init__()
            object.__setattr__(self, "borrowed", lin)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.borrowed.weight  # type: ignore[operator]

    model.append(Reader(model[0].lin))
    assert list_bypassed(model) == {"0.lin.weight"}
    assert bypasses(nn.Sequential(Reader(nn.Linear(3, 3)))) == {}


def test_code_without_source_is_passed_over() -> None:
    space: dict[str, Any] = {"nn": nn}
    text = "class Made(nn.Module):\n  def forward(self, x):\n    return x @ self.lin.weight\n"
    exec(textwrap.dedent(text), space)  # noqa: S102
    module = space["Made"]()
    module.lin = nn.Linear(2, 2)
    assert bypasses(module) == {}
    lambdas = type("Lambdas", (nn.Module,), {"forward": lambda self, x: x})
    assert bypasses(nn.Sequential(lambdas(), nn.Identity())) == {}


def test_odd_modules_are_no_trouble() -> None:
    recursive = type("Recursive", (Method,), {"helper": lambda self, x: self.helper(x)})
    for model in (
        nn.Module(),
        nn.ModuleList([nn.Linear(1, 1)]),
        nn.ParameterList([nn.Parameter(torch.ones(1))]),
        recursive(),
    ):
        assert bypasses(model) == {}
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    traced = torch.fx.symbolic_trace(Argument())
    assert bypasses(normed) == {} and list_bypassed(traced) == {"lin.weight"}


def test_rewritten_module_is_read_as_its_base_class() -> None:
    model = Argument()
    site = type("Argument", (Argument,), {"forward": lambda self, x: self.lin(x), "_surgery_base": Argument})
    model.__class__ = site
    assert list_bypassed(model) == {"lin.weight"}
    assert bypasses(model)["lin"][0].reader_type.endswith("test_bypass.Argument")


# torch's own attention ----------------------------------------------------------------------------------------------


def test_attention_reads_its_output_projection() -> None:
    places = bypasses(nn.MultiheadAttention(4, 2))
    assert list(places) == ["out_proj"]
    assert {place.parameter for place in places["out_proj"] if not place.conditional} == {"weight", "bias"}
    assert list_bypassed(nn.MultiheadAttention(4, 2, bias=False)) == {"out_proj.weight"}


def test_encoder_layer_reads_all_its_children() -> None:
    layer = nn.TransformerEncoderLayer(4, 2)
    places = bypasses(layer)
    assert set(places) == {"self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"}
    fused = [place for group in places.values() for place in group if place.reader == ""]
    assert all(place.conditional and place.in_fast_path for place in fused)
    assert {place.reader for place in places["linear1"]} == {""}


def test_encoder_itself_only_asks_about_devices_and_gradients() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 2)
    readers = {place.reader for places in bypasses(encoder).values() for place in places}
    assert readers == {"layers.0", "layers.1", "layers.0.self_attn", "layers.1.self_attn"}
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 1)
    assert {path.rpartition(".")[2] for path in bypasses(decoder)} == {"out_proj"}


class Counted(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_switch_makes_the_layer_call_its_children(activation: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True
    ).double()
    layer.linear1.__class__ = Counted
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    layer.eval()
    with torch.no_grad():
        fused = layer(x)
        assert layer.linear1.calls == 0
        name, value = fastpath_switch(layer)  # type: ignore[misc]
        setattr(layer, name, value)
        called = layer(x)
    assert layer.linear1.calls == 1
    # The same mathematics in another order: float64 rounding of sums over 16 entries.
    torch.testing.assert_close(called, fused, rtol=1e-12, atol=1e-12)


def test_switch_is_asked_for_nothing_else() -> None:
    """In the layer's forward, the attribute is only a condition of the fused path and an argument of its kernel."""
    name, _ = fastpath_switch(nn.TransformerEncoderLayer(4, 2))  # type: ignore[misc]
    tree = ast.parse(textwrap.dedent(inspect.getsource(nn.TransformerEncoderLayer)))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == name]
    read = [node for node in uses if isinstance(node.ctx, ast.Load)]
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    kinds = sorted(type(parents[id(node)]).__name__ for node in read)
    assert kinds == ["Compare", "UnaryOp"]
    (kernel,) = [parents[id(parents[id(node)])] for node in read if isinstance(parents[id(node)], ast.Compare)]
    assert isinstance(kernel, ast.Call) and ast.unparse(kernel.func) == "torch._transformer_encoder_layer_fwd"


def test_switch_is_for_encoders_only() -> None:
    class Mine(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, **more: Any) -> Tensor:  # type: ignore[override]
            return super().forward(src, **more) + src @ self.linear2.weight.sum()

    mine = Mine(4, 2)
    assert fastpath_switch(mine) == ("activation_relu_or_gelu", 0)
    # The switch does not stop reads in a subclass's own code; the file of a bypass tells the two apart.
    assert {place.in_fast_path for place in bypasses(mine)["linear2"]} == {True, False}
    assert {place.in_fast_path for place in bypasses(mine)["linear1"]} == {True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 1)
    assert fastpath_switch(encoder) == ("use_nested_tensor", False)
    for module in (nn.MultiheadAttention(4, 2), nn.TransformerDecoderLayer(4, 2), nn.Linear(1, 1)):
        assert fastpath_switch(module) is None


# Reads at run time, as the reference ------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Records the parameters that torch functions get while another module's forward runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.owners: dict[int, dict[str, str]] = {}  # a tied parameter has several owners
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), {})[path] = name
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.running: list[str] = []
        self.seen: set[frozenset[str]] = set()

    def leave(self) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ASKING and self.running:
            for value in (*_flat(args), *_flat((kwargs or {}).values())):
                owners = self.owners.get(id(value), {})
                if owners and not owners.keys() & set(self.running):  # an owner may pass its own parameter to a child
                    self.seen.add(frozenset(f"{path}.{name}" for path, name in owners.items()))
        return func(*args, **(kwargs or {}))


# __get__: .dtype, .device, .shape; x.to(weight) takes its dtype and device.
ASKING = {"__get__", "__len__", "size", "dim", "data_ptr", "new_zeros", "to"}


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def watch_reads(model: nn.Module) -> Iterator[Watch]:
    watch = Watch(model)
    before = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: watch.running.append(watch.paths.get(id(module), "?"))
    )
    after = nn.modules.module.register_module_forward_hook(lambda module, args, out: watch.leave())
    try:
        with watch:
            yield watch
    finally:
        before.remove()
        after.remove()


def agree(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The search finds each read at run time; each read that it finds without a condition happens at run time."""
    with watch_reads(model) as watch:
        model(*args, **kwargs)
    tied = {f"{path}.{name}" for owners in watch.owners.values() if len(owners) > 1 for path, name in owners.items()}
    every = bypasses(model)
    certain = {f"{path}.{p.parameter}" for path, places in every.items() for p in places if not p.conditional}
    assert not [names for names in watch.seen if not names & list_bypassed(model)]
    assert certain - tied <= frozenset().union(*watch.seen)  # the run can't tell the owner of a tied parameter


@pytest.mark.parametrize("kind", [*READS, *NOTHING[2:], Branches], ids=lambda kind: kind.__name__)
def test_agrees_with_a_run(kind: type[nn.Module]) -> None:
    if kind in (Returned, AnyIndex, SlicesItsList):
        pytest.skip("what is given back meets no torch function, and a run takes one index of many")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(kind(), torch.randn(3, 3))


@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_a_run_of_attention(training: bool) -> None:
    x = torch.randn(2, 3, 4)
    agree(nn.MultiheadAttention(4, 2, batch_first=True).train(training), x, x, x)
    agree(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).train(training), x)
    agree(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).train(training), x, x)


# transformers' models -----------------------------------------------------------------------------------------------

SMALL = {
    name: 2
    for name in "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers".split()
}
CONV = {"conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "x_proj.weight", "out_proj.weight"}
FAMILIES: dict[str, set[str]] = {
    **dict.fromkeys(
        "bert roberta albert distilbert deberta-v2 electra gpt2 gptj llama mistral qwen2 gemma phi mixtral t5 bart"
        " whisper vit swin convnext resnet wav2vec2 opt falcon modernbert".split(),
        set(),
    ),
    "clip": {"position_embedding.weight"},  # interpolated for an image of another size
    "mamba": CONV,  # passed to kernels
    "bloom": {"dense.weight", "dense_4h_to_h.weight"},  # sliced where pretraining_tp > 1
    "deberta": {"in_proj.weight"},  # chunked where query_states are given
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_family(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[family]()
    for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig))):
        for name, value in SMALL.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, value)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert {".".join(name.split(".")[-2:]) for name in list_bypassed(model)} == FAMILIES[family]


def test_perceivers_decoder_reads_the_embedding_it_is_handed() -> None:
    pytest.importorskip("transformers")
    from tests.support.families import FAMILIES

    model = FAMILIES["perceiver"].make().eval()
    assert list_bypassed(model) == {"perceiver.input_preprocessor.embeddings.weight"}
    agree(model, **FAMILIES["perceiver"].inputs())


def test_transformers_models_agree_with_a_run() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (1, 6))
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {**tiny, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(
        **{k: v for k, v in heads.items() if k != "vocab_size"}, image_size=8, patch_size=4
    )
    wavlm = transformers.WavLMConfig(
        **heads,
        conv_dim=(8,),
        conv_kernel=(4,),
        conv_stride=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    mobile = {**heads, "embedding_size": 4, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    for model, inputs in (
        (transformers.BertModel(transformers.BertConfig(**heads)), (ids,)),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**heads, num_key_value_heads=1)), (ids,)),
        (transformers.MambaForCausalLM(transformers.MambaConfig(**tiny, state_size=4, time_step_rank=2)), (ids,)),
        (transformers.CLIPVisionModel(clip), (torch.randn(1, 3, 8, 8),)),
        (transformers.WavLMModel(wavlm), (torch.randn(1, 64),)),
        (transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**mobile)), (ids,)),
    ):
        agree(model.eval(), *inputs)
