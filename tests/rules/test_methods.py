"""The methods beside LoRA: each against arithmetic written out here, against PEFT's layer, and out again to the bit."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from surgery import (
    PlanError,
    Rule,
    RuleError,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rules_from_json,
    rules_to_json,
    summary,
    unmerge,
)
from surgery.rules import (
    BoftRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    MissRule,
    OftRule,
    RoadRule,
    VeraRule,
)
from surgery.testing import assert_reversible

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import peft
    except ImportError:
        peft: Any = None
    from transformers.pytorch_utils import Conv1D

needs_peft = pytest.mark.skipif(peft is None, reason="compares with PEFT")

Held = Mapping[str, Tensor]
Changed = tuple[Tensor, Tensor]  # weight (out, in, *kernel) and bias


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """What it does with its weight is not linear in it."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


IMAGE = (2, 8, 7, 7)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(16, 12), (3, 16)),
    "Linear3d": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "Conv1D": (lambda: Conv1D(12, 16), (2, 3, 16)),
    "Conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1, stride=2), (2, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), IMAGE),
    "Conv2d-1x1": (lambda: nn.Conv2d(8, 12, 1), IMAGE),
    "Conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), IMAGE),
    "Conv2d-reflect": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="reflect"), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(4, 12, 2), (1, 4, 4, 4, 4)),
    "SamePadding": (lambda: SamePadding(8, 12, 3), IMAGE),
    "Standardised": (lambda: Standardised(8, 12, 3), IMAGE),
    "Activated": (lambda: Activated(16, 12), (3, 16)),
}


# Each method, written out ------------------------------------------------------------------------------------


def ia3(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    s = held["scale"]
    if not rule.feedforward:
        return w * s.view(-1, *(1,) * (w.dim() - 1)), b * s
    w = w.clone()
    groups = len(s) // w.shape[1]
    for o, i in itertools.product(range(w.shape[0]), range(w.shape[1])):
        w[o, i] *= s[o // (w.shape[0] // groups) * w.shape[1] + i]
    return w, b


def vera(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    return w + held["b"].diag() @ held["B"] @ held["d"].diag() @ held["A"], b


def effective(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij core[i, j] a[i, out] b[j, in]."""
    return sum(  # type: ignore[return-value]
        core[i, j] * a[i].view(-1, 1, *(1,) * (core.dim() - 2)) * b[j].view(1, -1, *(1,) * (core.dim() - 2))
        for i, j in itertools.product(range(len(a)), range(len(b)))
    )


def loha(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    if "t1" in held:
        first, second = (effective(held[f"t{n}"], held[f"w{n}_a"], held[f"w{n}_b"]) for n in (1, 2))
    else:
        first, second = (held[f"w{n}_a"] @ held[f"w{n}_b"] for n in (1, 2))
    return w + rule.alpha / rule.rank * (first * second).reshape(w.shape), b


def lokr(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    w1 = held["w1"] if "w1" in held else held["w1_a"] @ held["w1_b"]
    if "w2" in held:
        w2 = held["w2"]
    elif "t2" in held:
        w2 = effective(held["t2"], held["w2_a"], held["w2_b"])
    else:
        w2 = held["w2_a"] @ held["w2_b"]
    o, i = w1.shape
    w2 = w2.reshape(w.shape[0] // o, w.shape[1] // i, *w.shape[2:])
    rows = [torch.cat([w1[row, column] * w2 for column in range(i)], 1) for row in range(o)]
    return w + rule.alpha / rule.rank * torch.cat(rows, 0), b


def skew(numbers: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size)
    places = list(itertools.combinations(range(size), 2))
    for (i, j), number in zip(places, numbers, strict=True):
        q[i, j], q[j, i] = number, -number
    return q


def oft(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    width = math.prod(w.shape[1:])
    size = rule.block_size or width // rule.blocks
    blocks = []
    for row in held["R"]:
        q, eye = skew(row, size), torch.eye(size)
        if rule.coft:
            q = q * min(1.0, rule.eps / math.sqrt(len(held["R"])) / float(q.detach().norm()))
        if rule.use_cayley_neumann:
            powers = [torch.linalg.matrix_power(q, n) for n in range(5)]
            assert rule.num_cayley_neumann_terms == 5
            blocks.append(powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4])
        else:
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
    blocks = blocks * (width // size) if rule.block_share else blocks
    return (w.flatten(1) @ torch.block_diag(*blocks).T).view(w.shape), b


def boft(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    """With the permutation matrices of the paper's code: within a block, even half blocks first, then odd ones."""
    width, rows = math.prod(w.shape[1:]), w.flatten(1)
    size = held["R"].shape[-1]
    for i, factor in enumerate(held["R"]):
        length, half = size * 2**i, size // 2
        chunks = [torch.arange(at, at + half) for at in range(0, length, half)] if i else [torch.arange(length)]
        order = torch.cat(chunks[::2] + chunks[1::2])
        P = torch.eye(width)[torch.cat([start + order for start in range(0, width, length)])]
        q = [(r - r.T) / 2 for r in factor]
        turns = torch.block_diag(*((torch.eye(size) - one) @ torch.linalg.inv(torch.eye(size) + one) for one in q))
        rows = rows @ (P @ turns @ P.T).T
    return (rows * held["s"]).view(w.shape), b


def hra(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    rows, vectors = w.flatten(1), []
    for u in held["u"].T:
        if rule.apply_GS:
            for other in vectors:
                u = u - (u @ other) * other
        u = u / u.norm()
        vectors.append(u)
        rows = rows @ (torch.eye(len(u)) - 2 * torch.outer(u, u))
    return rows.view(w.shape), b


def road(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    half, out = rule.group_size // 2, len(w)
    R = torch.zeros(out, out)
    for o in range(out):
        group, place = divmod(o, rule.group_size)
        first = place < half
        other = o + half if first else o - half
        if rule.variant == "road_1":
            c = s = group * half + place % half
        elif rule.variant == "road_2":
            c = s = o
        else:
            c, s = group * 2 * rule.group_size + place, group * 2 * rule.group_size + rule.group_size + place
        R[o, o] = held["alpha"][c] * held["theta"][c].cos()
        R[o, other] = held["alpha"][s] * held["theta"][s].sin() * (-1 if first else 1)
    return R @ w, R @ b


def miss(w: Tensor, b: Tensor, held: Held, rule: Any) -> Changed:
    D, r, new = held["block"], rule.rank, w.clone()
    if rule.variant == "bat":
        for o, i in itertools.product(range(0, w.shape[0], r), range(0, w.shape[1], r)):
            piece = w[o : o + r, i : i + r]
            new[o : o + r, i : i + r] = piece + piece @ D[o // r] + D[o // r]
        return new, b
    for o, i in itertools.product(range(w.shape[0]), range(w.shape[1])):
        new[o, i] = w[o, i] + D[i % r, o % rule.mini_r if rule.variant == "mini" else o]
    return new, b


@dataclass
class Method:
    rule: Rule
    by_hand: Callable[[Tensor, Tensor, Held, Any], Changed]
    in_peft: tuple[str, ...]  # the layers that PEFT has it on, and computes right
    fields: dict[str, Any] = field(default_factory=dict)  # of PEFT's config
    layers: tuple[str, ...] = tuple(LAYERS)


# PEFT's config, and PEFT's names for our tensors ("{}" is the adapter's)
PEFTS: dict[type[Rule], tuple[str, Mapping[str, str]]] = {
    IA3Rule: ("IA3Config", {"scale": "ia3_l"}),
    VeraRule: ("VeraConfig", {"d": "vera_lambda_d", "b": "vera_lambda_b"}),
    LohaRule: ("LoHaConfig", {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
    LokrRule: ("LoKrConfig", {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
    OftRule: ("OFTConfig", {"R": "oft_R.{}.weight"}),
    BoftRule: ("BOFTConfig", {"R": "boft_R", "s": "boft_s"}),
    HraRule: ("HRAConfig", {"u": "hra_u"}),
    MissRule: ("MissConfig", {"block": "miss_block"}),
    RoadRule: ("RoadConfig", {"theta": "road_theta", "alpha": "road_alpha"}),
}
LINEARS = ("Linear", "Linear3d")
PLAIN = (*LINEARS, "Conv1D")
OWN = (*PLAIN, "Activated")  # with a forward of its own, whose weight is edited
IMAGES = ("Conv2d", "Conv2d-1x1", "Conv2d-groups")
SCALED = (*PLAIN, "Conv2d", "Conv2d-groups", "Conv3d")
BOTH: dict[str, Any] = {"decompose_both": True, "decompose_factor": 4, "use_effective_conv2d": True}
METHODS: dict[str, Method] = {
    "ia3": Method(IA3Rule("m"), ia3, SCALED, {"feedforward_modules": []}),
    "ia3-feedforward": Method(IA3Rule("m", feedforward="m"), ia3, SCALED, {"feedforward_modules": ["m"]}),
    "vera": Method(VeraRule("m", rank=5), vera, PLAIN, {"r": 5}, layers=OWN),
    "loha": Method(LohaRule("m", rank=3, alpha=2), loha, (*LINEARS, "Conv1d", *IMAGES), {"r": 3, "alpha": 2}),
    "loha-effective": Method(
        LohaRule("m", rank=3, use_effective_conv2d=True),
        loha,
        ("Linear", "Conv1d", *IMAGES),
        {"r": 3, "use_effective_conv2d": True},
    ),
    "lokr": Method(LokrRule("m", rank=1, alpha=2), lokr, (*LINEARS, "Conv1d", *IMAGES), {"r": 1, "alpha": 2}),
    # PEFT takes the kernel of a Conv1d for features here, and stops in the next one.
    "lokr-whole": Method(LokrRule("m", rank=8, alpha=2), lokr, (*LINEARS, *IMAGES), {"r": 8, "alpha": 2}),
    "lokr-both": Method(LokrRule("m", rank=1, **BOTH), lokr, ("Linear", *IMAGES), {"r": 1, **BOTH}),
    # On a Conv2d PEFT's OFT cuts the input into patches and adds them up again, overlaps and all.
    "oft": Method(OftRule("m", block_size=4), oft, LINEARS, {"oft_block_size": 4}),
    "oft-exact": Method(
        OftRule("m", block_size=0, blocks=2, use_cayley_neumann=False),
        oft,
        LINEARS,
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
    ),
    "oft-shared": Method(
        OftRule("m", block_size=4, block_share=True), oft, LINEARS, {"oft_block_size": 4, "block_share": True}
    ),
    "coft": Method(
        OftRule("m", block_size=4, coft=True, eps=0.3), oft, LINEARS, {"oft_block_size": 4, "coft": True, "eps": 0.3}
    ),
    "boft": Method(BoftRule("m"), boft, (*LINEARS, "Conv2d", "Conv2d-1x1")),
    # PEFT has no butterfly without its CUDA extension.
    "boft-butterfly": Method(
        BoftRule("m", block_size=0, blocks=4, n_butterfly_factor=3),
        boft,
        (),
        layers=(*PLAIN, "Conv2d-1x1", "Activated"),
    ),
    "hra": Method(HraRule("m", rank=4), hra, (*LINEARS, "Conv2d", "Conv2d-1x1"), {"r": 4}),
    "hra-gs": Method(HraRule("m", rank=3, apply_GS=True), hra, ("Linear", "Conv2d"), {"r": 3, "apply_GS": True}),
    "miss": Method(MissRule("m", rank=4), miss, LINEARS, {"r": 4}, layers=OWN),
    "miss-uneven": Method(MissRule("m", rank=5), miss, LINEARS, {"r": 5}, layers=OWN),
    "miss-mini": Method(
        MissRule("m", rank=4, variant="mini", mini_r=2),
        miss,
        LINEARS,
        {"r": 4, "mini_r": 2, "init_weights": "mini"},
        layers=OWN,
    ),
    "miss-bat": Method(
        MissRule("m", rank=4, variant="bat"), miss, LINEARS, {"r": 4, "init_weights": "bat"}, layers=PLAIN
    ),
    **{
        variant: Method(
            RoadRule("m", variant=variant, group_size=4),
            road,
            LINEARS,
            {"variant": variant, "group_size": 4},
            layers=OWN,
        )
        for variant in ("road_1", "road_2", "road_4")
    },
}


def cases(which: str = "layers", among: tuple[str, ...] = tuple(LAYERS)) -> Any:
    """Each method with each of its layers."""
    found = ((name, layer) for name, method in METHODS.items() for layer in getattr(method, which))
    return pytest.mark.parametrize("name, layer", [(name, layer) for name, layer in found if layer in among])


def example(layer: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[layer]
    return Holder(make()), torch.randn(shape)


class Holder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def disturbed(model: nn.Module, by: float = 0.3) -> dict[str, Tensor]:
    """The adapter's tensors, moved as training would."""
    held: Any = model.get_submodule("m.adapters.default")
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return held.tensors()


def expected_of(model: Any, base: Any, method: Method, held: Held) -> tuple[dict[str, Tensor], Tensor]:
    """The weight and bias that the method gives the layer, worked out by hand."""
    turned = isinstance(base.m, Conv1D)
    weight = base.m.weight.detach().T if turned else base.m.weight.detach()
    bias = torch.zeros(len(weight)) if base.m.bias is None else base.m.bias.detach()
    changed, shifted = method.by_hand(weight, bias, held, method.rule)
    found = {"m.weight": changed.T if turned else changed}
    return found if base.m.bias is None else {**found, "m.bias": shifted}, bias  # type: ignore[return-value]


def assert_close(found: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal to within a few float32 roundings of the largest entry: sums are taken in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= slack * max(1.0, float(expected.abs().max().detach()))


@cases()
def test_the_method_is_its_formula(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    base = copy.deepcopy(model)
    apply_rules(model, [method.rule], example_inputs=x)
    held = {key: tensor.detach().clone() for key, tensor in disturbed(model).items()}
    changed, _ = expected_of(model, base, method, held)
    with torch.no_grad():
        expected = functional_call(base, changed, x)
        live = model(x)
        assert (live - base(x)).abs().max() > 1e-3
        assert_close(live, expected, 1e-5)
        merge(model)
        assert type(model.m) is type(base.m)
        assert_close(model(x), expected, 1e-5)
        for path, tensor in changed.items():
            assert_close(model.get_parameter(path), tensor, 3e-6)
        assert torch.equal(unmerge(model)(x), live)
    remove(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


@cases()
def test_in_and_out_leaves_no_trace(name: str, layer: str) -> None:
    model, x = example(layer)
    assert_reversible(model, [METHODS[name].rule], example_inputs=x)


@cases(among=("Linear", "Conv1D", "Conv2d", "Conv2d-groups"))
def test_gradients_are_those_of_the_formula(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    base = copy.deepcopy(model)
    # Constrained OFT's projection passes gradients on as they are: here it is out of reach.
    method = replace(method, rule=method.rule.replace(eps=100.0)) if name == "coft" else method
    apply_rules(model, [method.rule])
    held = disturbed(model)
    weights = torch.randn_like(model(x))
    (model(x) * weights).sum().backward()
    twin = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in held.items()}
    (functional_call(base, expected_of(model, base, method, twin)[0], x) * weights).sum().backward()
    for key, tensor in held.items():
        if tensor.requires_grad:
            assert tensor.grad is not None and twin[key].grad is not None, key
            assert_close(tensor.grad, twin[key].grad, 2e-5)  # type: ignore[arg-type]


# PEFT ---------------------------------------------------------------------------------------------------------


def in_peft(model: nn.Module, method: Method, **fields: Any) -> Any:
    config = getattr(peft, PEFTS[type(method.rule)][0])(target_modules=["m"], **{**method.fields, **fields})
    return peft.get_peft_model(copy.deepcopy(model), config)


def theirs_of(layer: Any, method: Method) -> dict[str, Tensor]:
    """PEFT's tensors under our names: parameters where they are trained."""
    found: dict[str, Tensor] = {}
    for name, path in PEFTS[type(method.rule)][1].items():
        if "{}" in path:
            found[name] = layer.get_parameter(path.format("default"))
        elif "default" in (held := getattr(layer, path)):
            found[name] = held["default"]
    if isinstance(method.rule, VeraRule):
        found["A"] = layer.vera_A["default"][:, : layer.in_features]
        found["B"] = layer.vera_B["default"][: layer.out_features]
    return found


def take_over(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    assert {name for name in ours if name != "index"} == theirs.keys()
    with torch.no_grad():
        for name, tensor in theirs.items():
            assert tensor.numel() == ours[name].numel(), name
            if name not in ("scale", "s"):  # PEFT keeps these in the shape of a layer's output
                assert tensor.shape == ours[name].shape, name
            ours[name].copy_(tensor.view(ours[name].shape))


@needs_peft
@pytest.mark.filterwarnings("ignore")
@cases("in_peft")
def test_given_the_same_tensors_it_is_pefts(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    theirs, ours = in_peft(model, method), apply_rules(model, [method.rule])
    wrapped = theirs.base_model.model.m
    tensors = theirs_of(wrapped, method)
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    mine: Any = ours.get_submodule("m.adapters.default")
    take_over(tensors, mine.tensors())
    found, expected = ours(x), theirs(x)
    assert_close(found, expected, 3e-6)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for key, tensor in tensors.items():
        # PEFT's are of another function: test_peft_gives_loha_gradients_of_another_function
        if tensor.requires_grad and not ("t1" in tensors and key in ("w1_a", "w2_a")):
            assert tensor.grad is not None
            assert_close(mine.tensors()[key].grad, tensor.grad.view(mine.tensors()[key].shape), 1e-5)
    theirs.eval().merge_adapter()
    merge(ours.eval())
    for key, tensor in wrapped.base_layer.named_parameters():
        assert_close(ours.get_parameter(f"m.{key}"), tensor, 3e-6)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.in_peft])
def test_it_starts_as_in_peft(name: str) -> None:
    """Zeros and ones where PEFT has them; random tensors with its spread."""
    method = METHODS[name]
    model = Holder(nn.Linear(256, 256))
    if name == "vera":
        torch.manual_seed(5)
    theirs = theirs_of(in_peft(model, method).base_model.model.m, method)
    ours: Any = apply_rules(model, [method.rule]).get_submodule("m.adapters.default")
    for key, tensor in theirs.items():
        mine = ours.tensors()[key]
        if name == "vera":
            assert torch.equal(mine, tensor), key
        else:
            deviations = [float(t.std()) if t.numel() > 1 else 0.0 for t in (mine, tensor)]
            if 0 < tensor.numel() < 100:
                assert (deviations[0] > 0) == (deviations[1] > 0), key
                continue
            assert deviations[0] == pytest.approx(deviations[1], rel=0.2, abs=1e-7), key
            assert float(mine.mean()) == pytest.approx(float(tensor.mean()), abs=0.2 * deviations[1] + 1e-7)


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_feedforward_modules_are_those_of_peft() -> None:
    from tests.support import tiny

    model, inputs = tiny.bert()
    targets, fed = ["key", "value", "output.dense"], ["re:.*layer.1.output.dense", "attention.output.dense"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=r".*(layer.1|attention).output.dense")
    theirs = peft.get_peft_model(copy.deepcopy(model.eval()), config)
    ours = apply_rules(model, [IA3Rule(targets, feedforward=fed)])
    assert summary(ours).trainable == theirs.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "ia3_l" in path:
                site = path.removeprefix("base_model.model.").removesuffix(".ia3_l.default")
                mine = ours.get_parameter(f"{site}.adapters.default.scale")
                parameter.add_(torch.randn_like(parameter) * 0.3)
                mine.copy_(parameter.flatten())
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)


reproduced = pytest.mark.skipif(
    peft is None or peft.__version__ != "0.21.2", reason="the failure was seen in PEFT 0.21.2; another may have none"
)


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_changes_a_convolution_by_an_oft_that_does_nothing() -> None:
    model, x = example("Conv2d")
    plain = model(x)
    assert (in_peft(model, METHODS["oft"])(x) - plain).abs().max() > 0.5
    assert torch.equal(apply_rules(model, [METHODS["oft"].rule], example_inputs=x)(x), plain)


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_has_no_kronecker_product_for_a_conv1d() -> None:
    model, x = example("Conv1d")
    method = METHODS["lokr-whole"]
    layer = in_peft(model, method, init_weights=False).base_model.model.m
    held = {key: tensor.detach() for key, tensor in theirs_of(layer, method).items()}
    zero = torch.zeros(12, 8, 3)
    delta = lokr(zero, torch.zeros(12), held, method.rule)[0]
    assert (layer.get_delta_weight("default") - delta).abs().max() > 0.1 * delta.abs().max()
    with pytest.raises(RuntimeError):
        in_peft(model, METHODS["lokr-both"])(x)


@reproduced
@pytest.mark.filterwarnings("ignore")
def test_peft_gives_loha_gradients_of_another_function() -> None:
    method = METHODS["loha-effective"]
    layer = in_peft(example("Conv2d")[0], method, init_weights=False).base_model.model.m
    held = theirs_of(layer, method)
    layer.get_delta_weight("default").sum().backward()
    twin = {key: tensor.detach().clone().requires_grad_() for key, tensor in held.items()}
    loha(torch.zeros(12, 8, 3, 3), torch.zeros(12), twin, method.rule)[0].sum().backward()
    for key, tensor in held.items():
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, twin[key].grad, atol=1e-5) == (key not in ("w1_a", "w2_a")), key  # type: ignore[arg-type]


# Dropout ------------------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, peft_field", [("vera", "vera_dropout"), ("miss-uneven", "miss_dropout")])
def test_a_seed_drops_out_the_same_inputs(name: str, peft_field: str) -> None:
    method = METHODS[name]
    model, x = example("Linear")
    theirs = in_peft(model, method, **{peft_field: 0.5})
    ours = apply_rules(model, [method.rule.replace(dropout=0.5)])
    mine: Any = ours.get_submodule("m.adapters.default")
    tensors = theirs_of(theirs.base_model.model.m, method)
    with torch.no_grad():
        tensors["b" if name == "vera" else "block"].normal_()
    take_over(tensors, mine.tensors())
    outputs = []
    for adapted in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(adapted(x))
    assert_close(*outputs)


@pytest.mark.parametrize("kind, rescaled", [(LohaRule, True), (LokrRule, False), (LokrRule, True)])
def test_rank_dropout_takes_out_rows_of_the_change(kind: Any, rescaled: bool) -> None:
    more: dict[str, Any] = {"rank_dropout_scale": rescaled} if kind is LokrRule else {}
    model: Any = Holder(nn.Linear(16, 200, bias=False))
    base = model.m.weight.detach().clone()
    apply_rules(model, [kind("m", rank=2, rank_dropout=0.3, init="random", **more)])
    eye = torch.eye(16)
    whole = model.eval()(eye).T - base
    dropped = model.train()(eye).T - base
    kept = dropped.abs().sum(1) > 1e-6
    assert 0.55 < kept.float().mean() < 0.85
    grown = 1 / kept.float().mean() if rescaled else torch.tensor(1.0)
    torch.testing.assert_close(dropped[kept], whole[kept] * grown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LohaRule, LokrRule])
def test_module_dropout_takes_out_the_whole_change(kind: Any) -> None:
    model: Any = Holder(nn.Linear(16, 12))
    x = torch.randn(2, 16)
    plain = model(x)
    apply_rules(model, [kind("m", rank=2, module_dropout=0.5, init="random")])
    whole = model.eval()(x)
    model.train()
    outputs = [model(x) for _ in range(40)]
    gone = [bool(torch.equal(output, plain)) for output in outputs]
    assert 8 < sum(gone) < 32
    assert all(torch.equal(output, whole) for output, out in zip(outputs, gone, strict=True) if not out)


def test_boft_dropout_lets_blocks_stand_still() -> None:
    model: Any = Holder(nn.Linear(400, 3, bias=False))
    weight = model.m.weight.detach().clone()
    apply_rules(model, [BoftRule("m", dropout=0.4, init="random")])
    model.m.adapters.default.s.data.fill_(1.0)
    moved = (model.train()(torch.eye(400)).T - weight).view(3, 100, 4).abs().amax((0, 2)) > 1e-6
    assert 0.4 < moved.float().mean() < 0.8
    assert bool(((model.eval()(torch.eye(400)).T - weight).view(3, 100, 4).abs().amax((0, 2)) > 1e-6).all())


# Beside other rules, in other forms -----------------------------------------------------------------------------


@cases(among=("Linear", "Conv2d-1x1"))
def test_a_stack_merges_in_any_order(name: str, layer: str) -> None:
    method = METHODS[name]
    model, x = example(layer)
    before = copy.deepcopy(model)
    rules = {"a": method.rule, "b": LoraRule("m", rank=2, init="random"), "c": method.rule}
    rules["d"] = LoraRule("m", rank=2, dora=True)
    for order in ("abcd", "dbac", "acdb", "bdca"):
        for adapter in order:
            apply_rules(model, [rules[adapter]], adapter=adapter)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapters." in path:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            live = model(x)
            merge(model)
            assert_close(model(x), live, 1e-5)
            assert torch.equal(unmerge(model)(x), live)
        for adapter in reversed(order):
            remove(model, adapter)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    model, x = example("Linear")
    base = copy.deepcopy(model.to(dtype))
    apply_rules(model, [method.rule])
    held = {key: tensor.detach() for key, tensor in disturbed(model, 0.1).items()}
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in held.values())
    changed, _ = expected_of(model, base.float(), method, held)
    expected = functional_call(base, changed, x.to(dtype).float())
    found = model(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.05
    found.float().sum().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if ".adapters." in path)


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast(name: str) -> None:
    model, x = example("Linear")
    apply_rules(model, [METHODS[name].rule])
    disturbed(model)
    whole = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found.detach().float() - whole).abs().max() <= 0.03 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_and_exports(name: str) -> None:
    torch._dynamo.reset()  # a class of forwards is compiled only so often
    model, x = example("Linear")
    apply_rules(model, [METHODS[name].rule])
    disturbed(model)
    with torch.no_grad():
        live = model(x)
        assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), live)
        assert_close(torch.export.export(model.eval(), (x,)).module()(x), live)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_on_a_quantised_linear(name: str, optional: Callable[[str], Any]) -> None:
    bnb = optional("bitsandbytes")
    method = METHODS[name]
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    model, x = Holder(layer.to("cpu")), torch.randn(3, 64)
    if isinstance(method.rule, BoftRule) or name == "miss-bat":
        with pytest.raises(PlanError, match="packed"):
            apply_rules(model, [method.rule])
        return
    weight = model(torch.eye(64)).T - layer.bias[:, None]
    apply_rules(model, [method.rule])
    held = {key: tensor.detach() for key, tensor in disturbed(model).items()}
    changed, bias = method.by_hand(weight.detach(), layer.bias.detach(), held, method.rule)
    assert_close(model(x), F.linear(x, changed, bias), 1e-4)
    with pytest.raises(PlanError, match="quantised"):
        merge(model)


# Fields and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_rules_are_written_and_read(name: str) -> None:
    assert rules_from_json(rules_to_json([METHODS[name].rule])) == [METHODS[name].rule]


@pytest.mark.parametrize(
    "kind, bad",
    [
        (IA3Rule, {"init": "ones"}),
        (IA3Rule, {"feedforward": [3]}),
        (VeraRule, {"rank": 0}),
        (VeraRule, {"dropout": 1.0}),
        (VeraRule, {"d_initial": "x"}),
        (VeraRule, {"projection_prng_key": -1}),
        (LohaRule, {"rank": 1.5}),
        (LohaRule, {"alpha": 0}),
        (LohaRule, {"init": "lycoris"}),
        (LohaRule, {"rank_pattern": {"m": 0}}),
        (LohaRule, {"alpha_pattern": {"(": 1}}),
        (LohaRule, {"alpha_pattern": {"m": -1}}),
        (LokrRule, {"decompose_factor": 0}),
        (LokrRule, {"decompose_both": 1}),
        (OftRule, {"blocks": 2}),
        (OftRule, {"block_size": 0}),
        (OftRule, {"eps": 0}),
        (OftRule, {"num_cayley_neumann_terms": 0}),
        (BoftRule, {"blocks": 2}),
        (BoftRule, {"n_butterfly_factor": 0}),
        (HraRule, {"apply_GS": "yes"}),
        (MissRule, {"variant": "mono"}),
        (MissRule, {"dropout": 0.5, "variant": "bat"}),
        (RoadRule, {"variant": "road_3"}),
        (RoadRule, {"group_size": 3}),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_told(kind: type[Rule], bad: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match=next(iter(bad))):
        kind("m", **bad)


@pytest.mark.parametrize(
    "rule, module, why",
    [
        *((METHODS[name].rule, nn.LayerNorm(4), "it goes on") for name in METHODS),
        (VeraRule("m"), nn.Conv2d(4, 4, 1), "it goes on Linear and transformers' Conv1D"),
        (RoadRule("m", group_size=8), nn.Linear(4, 12), "does not divide its 12 outputs"),
        (VeraRule("m", dropout=0.1), Activated(4, 12), "no input to act on: its forward is not a plain linear map"),
        (OftRule("m"), nn.Linear(50, 4), "does not divide the 50 numbers .* 25 does"),
        (OftRule("m", block_size=0, blocks=3), nn.Linear(50, 4), "blocks=3"),
        (BoftRule("m", n_butterfly_factor=3), nn.Linear(24, 4), "3 butterfly factors"),
        (HraRule("m", rank=5), nn.Linear(4, 4), "rank=5"),
        (MissRule("m", rank=5), nn.Linear(4, 4), "pieces of rank=5"),
        (MissRule("m", rank=2, variant="bat"), nn.Linear(4, 3), "pieces of rank=2"),
        (MissRule("m", rank=2, variant="mini", mini_r=2), nn.Linear(4, 3), "mini_r=2"),
        (IA3Rule("m", feedforward="n"), nn.Linear(4, 4), "feedforward has 'n'"),
        (LohaRule("m", rank_pattern={"n": 2}), nn.Linear(4, 4), "rank_pattern has 'n'"),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_told(rule: Rule, module: nn.Module, why: str) -> None:
    model = Holder(module)
    with pytest.raises(PlanError, match=why):
        apply_rules(model, [rule])
    assert type(model.m) is type(module) and not plan_rules(model, [rule])


def test_patterns_choose_rank_and_alpha() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_rules(model, [LohaRule(nn.Linear, rank=2, rank_pattern={"1": 3}, alpha_pattern={"0": 5})])
    assert [layer.adapters.default.w1_a.shape[1] for layer in model] == [2, 3]
    assert [LohaRule("x", rank=2, alpha=4, alpha_pattern={"0": 5}).scale_at(path) for path in "01"] == [2.5, 2.0]


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_at_random_where_asked(name: str) -> None:
    model, x = example("Linear")
    plain = model(x)
    apply_rules(model, [METHODS[name].rule.replace(init="random")])
    assert (model(x) - plain).abs().max() > 1e-4
