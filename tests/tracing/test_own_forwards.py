"""Every rule on modules with custom, generated forwards.

The live and the merged model must equal the forward run with the weights of the method's formula, or the plan must
refuse with a reason. The reference is `functional_call` on an untouched copy; `tests/support/method_formulas.py` has
the formulas.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from surgery import (
    MergeError,
    PlanError,
    Rule,
    SurgeryError,
    activate,
    apply_rules,
    merge,
    plan_rules,
    remove,
    route,
    rule,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
    BiasRule,
    BottleneckRule,
    C3aRule,
    FourierRule,
    LoraRule,
    MissRule,
    NormRule,
    OftRule,
    RandLoraRule,
    ShiraRule,
    TokensRule,
    TrainRule,
)
from surgery.rules.slots.low_rank import LowRankSlotRule
from surgery.testing import Snapshot
from tests.support.method_formulas import Params
from tests.support.methods import METHODS, Conv1D, Method

EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "60"))
IN, OUT = 16, 12


@contextmanager
def doubles() -> Iterator[None]:
    """Use float64, in which rounding can't hide a missing factor; the formulas create tensors in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Methods ------------------------------------------------------------------------------------------------------


def lora(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    rank = len(tensors["A"])
    A, B, scale = tensors["A"].flatten(1), tensors["B"].flatten(1), rule.alpha / rank
    parts = A.shape[0] // B.shape[1]  # each group of a convolution has its share of the rank
    blocks = [B[i * len(w) // parts : (i + 1) * len(w) // parts] @ A.chunk(parts)[i] for i in range(parts)]
    changed = w + scale * torch.cat(blocks).view(w.shape)
    if not rule.dora:
        return changed, b + scale * tensors["B_bias"] if rule.lora_bias else b
    gain = tensors["magnitude"].flatten() / changed.flatten(1).norm(dim=1)
    shifted = b + scale * gain * tensors["B_bias"] if rule.lora_bias else b
    return changed * gain.view(-1, *(1,) * (w.dim() - 1)), shifted


def adalora(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    A, E, B = (tensors[name].flatten(1) for name in "AEB")
    return w + rule.alpha / (rule.rank + 1e-5) * (B @ (E.flatten().unsqueeze(1) * A)).view(w.shape), b


def shira(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    return (w.flatten() + torch.zeros(w.numel()).scatter(0, tensors["index"], tensors["values"])).view(w.shape), b


def fourier(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    spectrum = torch.zeros(w.numel()).scatter(0, tensors["index"], tensors["spectrum"]).view(w.shape)
    return w + rule.scaling * torch.fft.ifft2(spectrum).real, b


def c3a(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    kernel, size, new = tensors["kernel"], rule.block_size, w.clone()
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            new[o, i] += kernel[o // size, i // size, (i - o) % size] / w.shape[1]
    return new, b


def randlora(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    delta = sum(
        tensors["B"][:, n] @ tensors["lambda_"][:, n].diag() @ tensors["A"][:, 0] @ tensors["gamma"][n].diag()
        for n in range(tensors["gamma"].shape[0])
    )
    return w + rule.alpha / rule.rank * (delta if delta.shape == w.shape else delta.T), b  # type: ignore[union-attr]


def copies(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    return tensors.get("weight", w), tensors.get("bias", b)


def tokens(w: Tensor, b: Tensor, tensors: Params, rule: Any) -> tuple[Tensor, Tensor]:
    return w.index_copy(0, tensors["index"], tensors["rows"]), b


OTHERS: dict[str, Method] = {
    "lora": Method(LoraRule("m", rank=4, alpha=6), lora, ()),
    "lora-bias": Method(LoraRule("m", rank=4, alpha=6, lora_bias=True), lora, ()),
    "dora": Method(LoraRule("m", rank=4, alpha=6, dora=True), lora, ()),
    "dora-bias": Method(LoraRule("m", rank=4, alpha=6, dora=True, lora_bias=True), lora, ()),
    "adalora": Method(AdaLoraRule("m", rank=4, alpha=6, total_step=10), adalora, ()),
    "shira": Method(ShiraRule("m", rank=2, random_seed=3), shira, ()),
    "fourier": Method(FourierRule("m", n_frequency=10, scaling=20.0), fourier, ()),
    "c3a": Method(C3aRule("m", block_size=4), c3a, ()),
    "randlora": Method(RandLoraRule("m", rank=3, alpha=6), randlora, ()),
    "train": Method(TrainRule("m"), copies, ()),
    "bias": Method(BiasRule("m"), copies, ()),
    "norm": Method(NormRule("m"), copies, ()),
    "tokens": Method(TokensRule("m", tokens=[3, 1]), tokens, ()),
}
ALL = {**METHODS, **OTHERS}
# These methods accept a custom forward only if it is provably the plain map.
STRICT = (AdaLoraRule, ShiraRule, FourierRule, C3aRule, RandLoraRule)


# Forwards -----------------------------------------------------------------------------------------------------

BEFORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda self, x: x,
    "scaled": lambda self, x: x * 0.25,
    "clamped": lambda self, x: x.clamp(-0.5, 0.5),
    "permuted": lambda self, x: x.flip(-1),
    "normalised": lambda self, x: x / x.norm(),
    "rowwise": lambda self, x: F.normalize(x, dim=-1),
    "shifted": lambda self, x: x + 1.0,
}
AFTER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda self, y: y,
    "doubled": lambda self, y: y * 2,
    "muP": lambda self, y: y / self.width,
    "by a buffer": lambda self, y: self.gain.to(y.dtype) * y,
    "by features": lambda self, y: y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype),
    "clamped": lambda self, y: y.clamp(-0.3, 0.3),
    "clamped far away": lambda self, y: y.clamp(-30.0, 30.0),
    "permuted": lambda self, y: y.flip(-1),
    "normalised": lambda self, y: F.normalize(y, dim=-1),
    "normalised as a whole": lambda self, y: y / y.norm(),
    "shifted": lambda self, y: y + 1.0,
    "cut": lambda self, y: y[..., ::2],
    "in training": lambda self, y: y.relu() if self.training else y,
    "decided": lambda self, y: y * 3 if float(y.abs().max()) > 4 else y,
    "without gradients": lambda self, y: y + y.detach(),
}


def single_input(base: Any, before: Any, after: Any) -> Any:
    class One(base):  # type: ignore[misc]
        def forward(self, x):
            return after(self, super().forward(before(self, x)))

    return One


def args(base: Any, before: Any, after: Any) -> Any:
    class Args(base):  # type: ignore[misc]
        def forward(self, *args):
            return after(self, super().forward(before(self, args[0])))

    return Args


def handed_on(base: Any, before: Any, after: Any) -> Any:
    class HandedOn(base):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            return after(self, super().forward(*args, **kwargs))

    return HandedOn


def named(base: Any, before: Any, after: Any) -> Any:
    class Named(base):  # type: ignore[misc]
        def forward(self, **kwargs):
            return after(self, super().forward(*kwargs.values()))

    return Named


def keyword(base: Any, before: Any, after: Any) -> Any:
    class Keyword(base):  # type: ignore[misc]
        def forward(self, *, input):
            return after(self, super().forward(before(self, input)))

    return Keyword


def rest(base: Any, before: Any, after: Any) -> Any:
    class Rest(base):  # type: ignore[misc]
        def forward(self, x, *rest, **more):
            return after(self, super().forward(before(self, x))) * more.get("times", 1.0)

    return Rest


def optional(base: Any, before: Any, after: Any) -> Any:
    class Optional(base):  # type: ignore[misc]
        def forward(self, x, scale=None, /, gate=1.0):
            y = after(self, super().forward(before(self, x)))
            return y * gate if scale is None else y * scale * gate

    return Optional


def second(base: Any, before: Any, after: Any) -> Any:
    class Second(base):  # type: ignore[misc]
        def forward(self, factor, x):
            return after(self, super().forward(before(self, x))) * factor

    return Second


# How a forward takes its input, and calls of it: (args, kwargs) for an input.
TAKING: dict[str, tuple[Any, list[Callable[[Tensor], tuple[tuple, dict[str, Any]]]]]] = {
    "one": (single_input, [lambda x: ((x,), {})]),
    "args": (args, [lambda x: ((x,), {})]),
    "handed on": (handed_on, [lambda x: ((x,), {})]),
    "named": (named, [lambda x: ((), {"input": x})]),
    "keyword": (keyword, [lambda x: ((), {"input": x})]),
    "rest": (rest, [lambda x: ((x,), {}), lambda x: ((x, 7), {"times": 3.0})]),
    "optional": (optional, [lambda x: ((x,), {}), lambda x: ((x, 2.0), {"gate": 0.5})]),
    "second": (second, [lambda x: ((torch.tensor(1.5), x), {})]),
}


def own_core(base: Any) -> Any:
    """Create a class that calls torch's function itself, on its parameters or on values computed from them."""
    function = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}.get(base)

    class Core(base):  # type: ignore[misc]
        def forward(self, input):
            if function is None:
                return super().forward(input)
            weight = self.weight if not self.centred else self.weight - self.weight.mean(-1, keepdim=True)
            return function(input, weight, self.bias)

    return Core


BASES: dict[str, tuple[Any, tuple, tuple[int, ...]]] = {
    "Linear": (nn.Linear, (IN, OUT), (3, IN)),
    "Conv1d": (nn.Conv1d, (8, 12, 3), (2, 8, 9)),
    "Conv2d": (nn.Conv2d, (8, 12, 3), (2, 8, 5, 5)),
    "Conv1D": (Conv1D, (OUT, IN), (2, 3, IN)),
    "Embedding": (nn.Embedding, (9, 6), (2, 5)),
    "LayerNorm": (nn.LayerNorm, (IN,), (3, IN)),
}


class Holder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.m(*args, **kwargs)


def generated(draw: random.Random) -> tuple[str, Holder, Tensor, list[Any]]:
    kind = draw.choice([*["Linear"] * 4, *BASES])
    base, sizes, shape = BASES[kind]
    core = own_core(base) if draw.random() < 0.5 and kind in ("Linear", "Conv1d", "Conv2d") else base
    names = ["nothing"] if kind == "Embedding" else list(BEFORE)
    make, calls = TAKING["one"]
    for _ in range(draw.choice([0, 0, 1])):  # a subclass of a subclass
        core = make(core, BEFORE[draw.choice(names)], AFTER[draw.choice(list(AFTER))])
    make, calls = TAKING[draw.choice(list(TAKING))]
    cls = make(core, BEFORE[draw.choice(names)], AFTER[draw.choice(list(AFTER))])
    module: Any = cls(*sizes)
    module.width, module.centred = 5, draw.random() < 0.3
    module.register_buffer("gain", torch.tensor(0.7))
    if draw.random() < 0.3 and kind == "Linear":
        module.bias = None
    if module._parameters.get("bias") is not None:
        nn.init.normal_(module.bias)  # type: ignore[arg-type]  # Conv1D's is zero
    x = torch.randint(0, 9, shape) if kind == "Embedding" else torch.randn(shape) * draw.choice([1.0, 1.0, 20.0])
    return kind, Holder(module), x, calls


def changed_of(base: Any, method: Method, tensors: Params) -> dict[str, Tensor]:
    turned = isinstance(base.m, Conv1D) or (isinstance(base.m, nn.Embedding) and isinstance(method.rule, LoraRule))
    turned = turned and method.by_hand is not copies
    weight = base.m.weight.detach().T if turned else base.m.weight.detach()
    own = base.m._parameters.get("bias")
    bias = torch.zeros(len(weight)) if own is None else own.detach()
    if isinstance(base.m, nn.Embedding) and isinstance(method.rule, OftRule):
        tensors = {**tensors, "R": -tensors["R"]}  # its output is turned, W R, where a Linear has W Rᵀ; R(-Q) = R(Q)ᵀ
    changed, shifted = method.by_hand(weight, bias, tensors, method.rule)
    return {"m.weight": changed.T if turned else changed, **({} if own is None else {"m.bias": shifted})}


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Compare with a tolerance for float64's rounding of sums in another order, times factors of the forward."""
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_live_is_the_own_forward_with_the_methods_weights_and_so_is_merged(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed % 2**31)
    with doubles():
        kind, model, x, calls = generated(draw)
        name = draw.choice([*ALL, *["lora", "lora-bias", "dora"] * 3])
        if not check(model, ALL[name], x, calls, draw):
            assert may_be_refused(kind, ALL[name].rule, model.m), (name, kind)


def may_be_refused(kind: str, rule: Rule, module: Any) -> bool:
    if isinstance(rule, STRICT) or (isinstance(rule, BiasRule) and module._parameters.get("bias") is None):
        return True
    if isinstance(rule, NormRule) or kind == "LayerNorm":
        return not isinstance(rule, TrainRule if kind != "LayerNorm" else (NormRule, TrainRule, BiasRule))
    if isinstance(rule, LoraRule):
        return rule.lora_bias and module._parameters.get("bias") is None
    if isinstance(rule, TokensRule):
        return kind not in ("Linear", "Embedding")
    method = next((method for method in METHODS.values() if method.rule is rule), None)
    return method is not None and kind not in method.layers


def check(model: Holder, method: Method, x: Tensor, calls: list[Any], draw: random.Random) -> bool:
    model.train(draw.random() < 0.5)
    base, before = copy.deepcopy(model), Snapshot(model)
    try:
        apply_rules(model, [method.rule])
    except PlanError as error:
        assert before.differences(model) == [] and all(problem.why or problem.what for problem in error.problems)
        return False
    site: Any = model.m
    tensors = site.adapters.default.tensors()
    with torch.no_grad():
        for tensor in tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(torch.randn_like(tensor) * 0.3)
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        changed = changed_of(base, method, tensors)
        expected = [functional_call(base, changed, *call(x)) for call in calls]
        live = [model(*args, **kwargs) for args, kwargs in (call(x) for call in calls)]
        for result, reference in zip(live, expected, strict=True):
            assert_same(result, reference)
        try:
            merge(model)
        except MergeError as error:
            assert isinstance(method.rule, LoraRule) and "no tensor 'bias'" in str(error), str(error)
        else:
            for call, reference in zip(calls, expected, strict=True):
                args, kwargs = call(x)
                assert_same(model(*args, **kwargs), reference)
            unmerge(model)
        for call, reference in zip(calls, live, strict=True):
            args, kwargs = call(x)
            assert torch.equal(model(*args, **kwargs), reference)
    remove(model)
    assert before.differences(model) == []
    return True


# Inputs without a name in the signature -----------------------------------------------------------------------


class First(nn.Linear):
    def forward(self, *args: Any) -> Tensor:
        return F.linear(args[0], self.weight, self.bias)


class Passed(nn.Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class Keywords(nn.Linear):
    def forward(self, **kwargs: Any) -> Tensor:
        return super().forward(**kwargs)


def by_place(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def by_name(module: nn.Module, x: Tensor) -> Any:
    return module(input=x)


WAYS = [(First, by_place), (Passed, by_place), (Passed, by_name), (Keywords, by_name)]


@pytest.mark.parametrize("cls, call", WAYS)
def test_lora_where_the_input_is_starred(cls: Any, call: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(cls(5, 4))
    weight, bias, x = model[0].weight.detach().clone(), model[0].bias.detach().clone(), torch.randn(3, 5)
    apply_rules(model, [LoraRule("0", rank=2, alpha=2, init="random")])
    tensors = model[0].adapters.default
    expected = F.linear(x, weight + tensors.B @ tensors.A, bias)
    torch.testing.assert_close(call(model[0], x), expected)
    loud = call(model[0], x).square().sum()
    loud.backward()
    assert tensors.A.grad.abs().sum() > 0 and tensors.B.grad.abs().sum() > 0
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(call(clone[0], x), expected)
    merge(model)
    torch.testing.assert_close(call(model[0], x), expected)


@pytest.mark.parametrize("cls, call", WAYS)
def test_rules_on_the_input_where_it_is_starred(cls: Any, call: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(cls(4, 4))
    base, x = copy.deepcopy(model[0]), torch.randn(3, 4)
    apply_rules(model, [BottleneckRule("0", size=2, placement="parallel")], adapter="beside")
    tensors = model[0].adapters.beside
    nn.init.normal_(tensors.up)
    beside = F.linear(F.linear(x, tensors.down, tensors.down_bias).relu(), tensors.up)
    torch.testing.assert_close(call(model[0], x), call(base, x) + beside)
    # Two adapters replace the input, one after the other; the bottleneck sees the result.
    apply_rules(model, [ShiftRule("0", by=1.0)], adapter="one")
    apply_rules(model, [ShiftRule("0", by=2.0)], adapter="two")
    activate(model, ["beside", "one", "two"])
    beside = F.linear(F.linear(x + 3, tensors.down, tensors.down_bias).relu(), tensors.up)
    torch.testing.assert_close(call(model[0], x), call(base, x + 3) + beside)
    remove(model, "one")
    remove(model, "beside")
    torch.testing.assert_close(call(model[0], x), call(base, x + 2))


@rule("test-own-shift-input")
class ShiftRule(Rule):
    by: float = 1.0

    def rewrite(self, site: Any) -> None:
        site.replace(site.input, site.input + site.param("shift", (), self.by))


def test_a_call_without_the_first_input_is_told() -> None:
    model: Any = nn.Sequential(Passed(4, 4))
    apply_rules(model, [ShiftRule("0")])
    with pytest.raises(TypeError, match="the first input of the call is ambiguous: its arguments are a, b"):
        model[0](a=torch.ones(4), b=torch.ones(4))


@pytest.mark.parametrize("cls", [First, Passed])
def test_rows_of_a_batch_where_the_input_is_starred(cls: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(cls(5, 4))
    for name in ("red", "blue"):
        apply_rules(model, [LoraRule("0", rank=2, init="random")], adapter=name)
    x = torch.randn(3, 5)
    with route(model, ["red", None, "blue"]):
        together = model(x)
    for i, name in enumerate(["red", None, "blue"]):
        activate(model, name or [])
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))


# Kept state ---------------------------------------------------------------------------------------------------


class Readout(nn.Linear):
    """A linear layer as in muP."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / 4) * 0.5


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"lora_bias": True}], ids=str)
def test_dropout_is_on_the_branch_where_the_map_is_only_scaled(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Readout(16, 6))
    apply_rules(model, [LoraRule("0", rank=2, dropout=0.9, init="random", **fields)])
    x = torch.randn(64, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    live = model(x)
    merge(model)
    torch.testing.assert_close(model(x), live)


class Remembers(nn.Linear):
    """A layer that counts its calls, draws random numbers, and stores its input."""

    calls: Tensor

    def __init__(self, inner: int, out: int):
        super().__init__(inner, out)
        self.register_buffer("calls", torch.zeros(()))
        self.inputs: list[Any] = []

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        self.inputs.append(input.shape)
        return super().forward(input + torch.rand(()) * 0.0)


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "miss", "road_1", "lokr", "oft"])
def test_planning_leaves_no_trace_in_what_a_forward_keeps(method: str) -> None:
    model: Any = nn.ModuleDict({"m": Remembers(IN, OUT)})
    before, state = Snapshot(model), torch.get_rng_state()
    assert not plan_rules(model, [ALL[method].rule]).problems
    assert before.differences(model) == [] and model["m"].inputs == [] and torch.equal(torch.get_rng_state(), state)
    apply_rules(model, [ALL[method].rule])
    assert float(model["m"].calls) == 0
    model["m"](torch.ones(IN))
    assert float(model["m"].calls) == 1 and len(model["m"].inputs) == 1


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-40, 40)


class Turned(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Centred(nn.Conv1d):
    """A class with torch's forward and an overridden method."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize("fields", [{}, {"gain": True}, {"bias": True}, {"gain": True, "bias": True}], ids=str)
@pytest.mark.parametrize(
    "make", [lambda: Doubled(6, 4), lambda: Clamped(6, 4), lambda: Turned(4, 6), lambda: Centred(6, 4, 3)]
)
def test_slots_are_the_own_forward_with_other_weights(make: Any, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Holder(make())
    base, x = copy.deepcopy(model), torch.randn(2, 6, 6) * 30
    apply_rules(model, [LowRankSlotRule("m", rank=2, **fields)])
    tensors: Any = model.m.adapters.default  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in tensors.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    part: Any = base.m
    turned = isinstance(part, Conv1D)
    weight = part.weight.T if turned else part.weight
    delta = (tensors.B.flatten(1) @ tensors.A.flatten(1)).view(weight.shape)
    gain = tensors.gain if fields.get("gain") else torch.ones(len(weight))
    changed = (weight + delta) * gain.view(-1, *(1,) * (weight.dim() - 1))
    bias = part.bias + gain * tensors.B_bias if fields.get("bias") else part.bias
    expected = functional_call(base, {"m.weight": changed.T if turned else changed, "m.bias": bias}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_forward_around_a_packed_weight_is_refused() -> None:
    class Packed(nn.Parameter):
        """A layer like those of quantising libraries: its parameter is a tensor subclass."""

    for cls, refused in ((nn.Linear, False), (Passed, False), (Doubled, True)):
        model: Any = nn.Sequential(cls(8, 8))
        model[0].weight = Packed(model[0].weight.detach(), requires_grad=False)
        for one_rule in (LoraRule("0"), AdaLoraRule("0", total_step=10), MissRule("0", rank=2)):
            problems = plan_rules(model, [one_rule]).problems
            assert bool(problems) == refused, (cls, one_rule)
            assert not refused or "does more than its base class's" in str(problems[0])


class Scaled8(nn.Linear):
    """A layer like transformers' FP8Linear: one byte per number, and a scale."""

    def __init__(self, inner: int, out: int):
        super().__init__(inner, out)
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.weight = nn.Parameter((self.weight.detach() / 0.5).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


class Scaled8Whole(Scaled8):
    def __init__(self, inner: int, out: int):
        super().__init__(inner, out)
        whole = (self.weight.detach().float() * 100).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)


NARROW = [LoraRule("m", rank=2), MissRule("m", rank=2), METHODS["vera"].rule, METHODS["loha"].rule, METHODS["hra"].rule]


@pytest.mark.parametrize("cls", [Scaled8, Scaled8Whole])
@pytest.mark.parametrize(
    "method_rule", [*NARROW, AdaLoraRule("m", rank=2, total_step=9)], ids=lambda method_rule: method_rule.label
)
def test_a_weight_of_one_byte_is_left_alone(cls: Any, method_rule: Rule) -> None:
    torch.manual_seed(0)
    model: Any = Holder(cls(IN, OUT))
    weight, bias = model.m.weight.to(torch.float32) * 0.5, model.m.bias
    apply_rules(model, [method_rule])
    tensors = {name: tensor.detach() for name, tensor in model.m.adapters.default.tensors().items()}
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    method = next(candidate for candidate in ALL.values() if type(candidate.rule) is type(method_rule))
    changed, _ = method.by_hand(weight, bias, tensors, method_rule)
    x = torch.randn(3, IN)
    torch.testing.assert_close(model(x), F.linear(x, changed, bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(SurgeryError, match="quantised"):
        merge(model)


@pytest.mark.parametrize("name", ["boft", "miss-bat", "shira", "dora", "train", "tokens"])
def test_a_weight_of_one_byte_is_not_edited(name: str) -> None:
    (problem, *_) = plan_rules(Holder(Scaled8(IN, OUT)), [ALL[name].rule]).problems
    assert "packed" in str(problem) or "which its own code unpacks" in str(problem)


@pytest.mark.parametrize("make", [lambda: nn.Embedding(9, 4), lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)])
def test_whole_numbers_take_no_change(make: Any) -> None:
    module = make().requires_grad_(False)
    module.weight = nn.Parameter(module.weight.to(torch.int32), requires_grad=False)
    (problem,) = plan_rules(Holder(module), [LoraRule("m")]).problems
    assert "its weight is torch.int32, which holds no changes" in str(problem)
