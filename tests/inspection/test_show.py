"""Runs the code that `show` prints, and compares its results with those of the site."""

from __future__ import annotations

import copy
import os
import re
import textwrap
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    MatchError,
    Rule,
    Site,
    Structure,
    SurgeryError,
    activate,
    apply_rules,
    deactivate,
    merge,
    rule,
    rules,
    show,
)
from surgery.forward.own_forward import own_forward
from surgery.inspection.readable_forward import Readable, readable_forward
from surgery.state.records import site_state, sites
from tests.reports.gallery import EXAMPLES, SHOWN
from tests.support import programs

# Rules of two adapters may overlap: the warning that the second removes an edit of the first is right.
pytestmark = pytest.mark.filterwarnings("ignore:.*an edit of the first has no effect:surgery.errors.SurgeryWarning")

COUNT = int(os.environ.get("PROGRAMS", "100"))
SEED = int(os.environ.get("PROGRAMS_SEED", "1"))


def readable(module: nn.Module) -> Readable:
    state = site_state(module)
    assert state is not None
    return readable_forward(module, state, own_forward(module, state.base))


def as_printed(module: nn.Module, printout: Readable, index: int = -1) -> nn.Module:
    """A copy of the module on the same tensors, with the printed code as its forward."""
    state = site_state(module)
    assert state is not None
    space: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "Base": state.base, **printout.names}
    code = textwrap.indent(printout.codes[index], "    ")
    exec(f"class Printed(Base):\n    _surgery_base = Base\n{code}", space)
    printed_module = copy.copy(module)
    printed_module.__dict__.update(
        {kind: dict(module.__dict__[kind]) for kind in ("_parameters", "_buffers", "_modules")}
    )
    object.__setattr__(printed_module, "__class__", space["Printed"])
    return printed_module


def outcome(module: nn.Module, args: tuple, seed: int = 3) -> Any:
    """The outputs of a call, gradients, random state and buffers; or the error."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(seed)
    args = tuple([x.clone().requires_grad_() * 1.0 if isinstance(x, Tensor) and x.is_floating_point() else x
                   for x in args])  # fmt: skip
    try:
        output = module(*args)
    except (RuntimeError, ValueError) as error:
        return "fails", str(error).split("\n")[0][:40]
    drawn = torch.random.get_rng_state()
    parts = [part for part in (output if isinstance(output, tuple) else [output]) if isinstance(part, Tensor)]
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        total = sum((part.float().sum() for part in parts), torch.zeros(()))
        gradients: Any = torch.autograd.grad(total, trained, allow_unused=True)
    except RuntimeError as error:
        gradients = str(error).split("\n")[0][:40]
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return [part.detach() for part in parts], gradients, drawn, after


def same(actual: Any, expected: Any, exact: bool) -> bool:
    if isinstance(actual, Tensor):
        equal = isinstance(expected, Tensor) and actual.dtype == expected.dtype and actual.shape == expected.shape
        if exact or not equal or not actual.is_floating_point():
            return equal and torch.equal(actual.nan_to_num(), expected.nan_to_num())
        # The site may run a fast form, which adds the same numbers in another order.
        error = 1e-5 if actual.dtype == torch.float32 else 2e-2
        return torch.allclose(actual, expected, rtol=error, atol=error, equal_nan=True)
    if isinstance(actual, dict):
        return same(list(actual.items()), list(expected.items()), exact)
    if isinstance(actual, (tuple, list)):
        return len(actual) == len(expected) and all(same(a, b, exact) for a, b in zip(actual, expected, strict=True))
    return actual == expected


def check(module: nn.Module, *args: Any, exact: bool = False) -> None:
    """Compare in both modes. The last printed code is for the first kind of call."""
    for training in (False, True):
        module.train(training)
        wanted = outcome(module, args)
        printout = readable(module)
        mine = outcome(as_printed(module, printout), args)
        assert same(mine, wanted, exact), f"{printout}\n{mine}\n{wanted}"


def disturb_adapters(model: nn.Module) -> nn.Module:
    """The model with random changes of the adapters, so that they change outputs."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".adapters." in f".{name}":
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


GIVEN: dict[str, tuple] = {
    "ExpertLoraRule": (torch.ones(2, 8), 1),
    "StatisticsRule": (torch.arange(32.0).view(4, 8),),
    **dict.fromkeys(("TokensRule", "BaseRowsRule", "PromptRule"), (torch.tensor([[1, 2, 7]]),)),
}


@pytest.mark.parametrize("name", [name for name in SHOWN if name != "MultitaskPromptRule"])
def test_every_rule(name: str) -> None:
    shown_rule, make = SHOWN[name]
    model = nn.Sequential(OrderedDict(m=make())).eval()
    apply_rules(model, [shown_rule], example_inputs=EXAMPLES.get(name))
    check(disturb_adapters(model).get_submodule("m"), *GIVEN.get(name, (torch.randn(1, 3, 8),)))


# Names of the engine's own functions, of generated functions, and texts that only the engine reads.
PLUMBING = "|".join((
    *("surgery_", "_surgery", "base_forward", "make_view", "same_dtype", "called_around", "in_region"),
    *(r"\btry\b", r"\bexcept\b", "(?=[0-9]*[a-f])[0-9a-f]{16}"),
))  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_no_plumbing_in_the_lines_of_a_rule(name: str) -> None:
    shown_rule, make = SHOWN[name]
    model = apply_rules(nn.Sequential(OrderedDict(m=make())).eval(), [shown_rule], example_inputs=EXAMPLES.get(name))
    text = str(show(model, "m"))
    assert not re.search(PLUMBING, text), text
    assert re.search(PLUMBING, str(show(model, "m", generated=True)))


@pytest.mark.parametrize(
    "kind, kwargs", [(nn.BatchNorm1d, {"num_features": 3}), (nn.TransformerEncoderLayer, {"d_model": 8, "nhead": 2})]
)
def test_a_module_in_the_place_of_another_is_one_call(kind: Any, kwargs: dict[str, int]) -> None:
    model = apply_rules(nn.Sequential(OrderedDict(m=nn.Linear(8, 8))), rules.ReplaceRule("m", by=kind, kwargs=kwargs))
    assert f"return {kind.__name__}(self.adapters.default, self.training)(input)" in str(show(model, "m"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x: Tensor, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return x + self.act(self.fc(self.norm(x))).to(dtype) * scale


@rule("show-in-place")
class InPlaceRule(Rule):
    """Writes in place, under torch.no_grad, and counts its calls."""

    def rewrite(self, site: Site) -> Tensor:
        seen, gate = site.buffer("seen", (1,)), site.param("gate", (site.out_features,), 0.5)
        with torch.no_grad():
            norm = site.output.norm(dim=-1, keepdim=True)
            seen += 1
            norm.clamp_(min=0.1)
        hidden = site.output / norm
        hidden[..., 0] = 0.0
        hidden *= gate
        return F.dropout(hidden, 0.5, site.training) + F.dropout(site.output, 0.25, site.training)  # type: ignore[arg-type]


@rule("show-modes")
class ModesRule(Rule):
    def rewrite(self, site: Site) -> Tensor:
        gate = site.param("gate", (8,), 0.5)
        noise = torch.randn_like(site.output)
        if site.training:
            return site.output + noise * gate
        return site.output


@rule("show-temper")
class TemperRule(Rule):
    def rewrite(self, site: Site) -> None:
        for weights in site.find(Structure(lambda scores: torch.softmax(scores, -1))):
            scores = weights.bindings["scores"]
            site.replace(scores, scores * site.param("temper", (2, 1, 1), 0.5))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 2
        if mask is not None:
            scores = scores.masked_fill(mask, -1e4)
        if self.training:
            scores = scores + 0.01
        return (self.dropout(torch.softmax(scores, -1)) @ v).transpose(1, 2).flatten(2)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
LINEAR: dict[str, list[Rule]] = {
    "dropout": [rules.LoraRule("m", rank=2, dropout=0.3)],
    "dora": [rules.LoraRule("m", rank=2, dropout=0.3, dora=True)],
    "lora with a bias": [rules.LoraRule("m", rank=2, lora_bias=True)],
    "two": [rules.LoraRule("m", rank=2, dropout=0.1), rules.LoraRule("m", rank=3, dropout=0.2)],
    "two kinds": [rules.IA3Rule("m"), rules.LoraRule("m", rank=3, dora=True)],
    "in place": [InPlaceRule("m")],
    "in place, then others": [InPlaceRule("m"), rules.IA3Rule("m"), rules.BottleneckRule("m", size=3)],
    "by mode": [ModesRule("m")],
    "a module": [rules.ReplaceRule("m", by=nn.BatchNorm1d, kwargs={"num_features": 3})],
}  # fmt: skip


@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR)
def test_stacks_on_a_linear_layer(name: str, dtype: torch.dtype, weight: float) -> None:
    model = nn.Sequential(OrderedDict(m=nn.Linear(8, 8))).to(dtype)
    for index, stacked_rule in enumerate(LINEAR[name]):
        apply_rules(model, [stacked_rule], adapter=f"a{index}")
    try:
        names = [f"a{index}" for index in range(len(LINEAR[name]))]
        activate(model, names, dict.fromkeys(names, weight))
    except SurgeryError:
        pytest.skip("its weight is 1")
    check(disturb_adapters(model).get_submodule("m"), X.to(dtype))


@pytest.mark.parametrize("one", [rules.BottleneckRule("", size=2), rules.SteerRule("", direction=[0.5] * 8),
                                 rules.LoraRule("fc", rank=2), rules.CaptureRule("")])  # fmt: skip
def test_a_forward_that_is_called(one: Rule) -> None:
    model = disturb_adapters(apply_rules(Block(), [one]))
    for _, module, _ in sites(model):
        check(module, X)


@pytest.mark.parametrize("mask", [None, torch.ones(3, 3, dtype=torch.bool).triu(1)])
def test_inside_of_a_forward(mask: Tensor | None) -> None:
    model = disturb_adapters(
        apply_rules(Attention(), [TemperRule(""), rules.BottleneckRule("", size=2, features=8)], example_inputs=X)
    )
    for training in (False, True):
        model.train(training)
        wanted = outcome(model, (X, mask))
        printout = readable(model)
        outcomes = [outcome(as_printed(model, printout, index), (X, mask)) for index in range(len(printout.codes))]
        assert any(same(mine, wanted, False) for mine in outcomes), printout


@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT // 2))
def test_random_programs(seed: int) -> None:
    torch.manual_seed(seed)
    kinds = list(programs.BASES)
    model = programs.BASES[kinds[seed % len(kinds)]]()
    count = 2 if seed % 3 == 0 else 1
    for index in range(count):
        source = programs.program(1000 * seed + index, f"p{index}v").as_rewrite()
        apply_rules(model, programs.SourceRule(type(model), source=source, seed=seed + index), adapter=f"a{index}")
    if count > 1:
        activate(model, [f"a{index}" for index in range(count)])
    check(model, torch.randn(3, programs.SIZE), exact=True)


@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT // 2))
def test_random_programs_inside_of_forwards(seed: int) -> None:
    torch.manual_seed(seed)
    inner = programs.inner_program(seed)
    model, x = programs.inner_base(inner), torch.randn(3, 4)
    for index, source in enumerate(inner.as_rewrites()):
        try:
            apply_rules(model, programs.SourceRule(type(model), source=source), adapter=f"a{index}", example_inputs=x)
        except SurgeryError as error:
            assert "changes nothing" in str(error)
    if site_state(model) is not None:
        check(model, x, exact=True)


class Double:
    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return x * 2


class Triple:
    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return x * 3


class Both(Rule):
    def rewrite(self, site: Site) -> Any:
        return site.apply(Triple.scaled, site.apply(Double.scaled, site.output))


# The printed text ------------------------------------------------------------------------------------------------


def lines(text: str) -> str:
    return textwrap.dedent(text).strip()


def test_the_rules_own_lines() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [rules.LoraRule("0", rank=2, dropout=0.1, dora=True)])
    assert show(model, "0") == lines("""
        # 0: Linear + LoraRule [default]
        def forward(self, input):
            y = F.linear(input, self.weight, self.bias)
            # LoraRule [default]
            A, B, magnitude = self.adapters.default.A, self.adapters.default.B, self.adapters.default.magnitude
            weight = self.weight.to(A.dtype)
            norm = torch.linalg.vector_norm(weight + B @ A * 4.0, dim=(1,)).view((8,)).detach()
            zero = norm.eq(0)
            gain = (magnitude / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0).view((8, 1))
            x = F.dropout(input.to(A.dtype), 0.1, self.training)
            branch = F.linear(F.linear(x, A), B) * 4.0
            gain_2 = gain.view((8,))
            weight = self.weight.to(x.dtype)
            base = F.linear(x, weight)
            branch = (gain_2 - 1) * base + gain_2 * branch
            return (y + branch).to(y.dtype)
    """)


def test_adapters_have_their_names_and_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b", "idle"):
        apply_rules(model, [rules.LoraRule("0", rank=2, alpha=2)], adapter=name)
    activate(model, ["a", "b"], {"b": 0.5})
    assert show(model, "0") == lines("""
        # 0: Linear + LoraRule [a], LoraRule [b]
        # idle: LoraRule [idle]
        def forward(self, input):
            y = F.linear(input, self.weight, self.bias)
            # LoraRule [a]
            a_A, a_B = self.adapters.a.A, self.adapters.a.B
            x = input.to(a_A.dtype)
            branch = F.linear(F.linear(x, a_A), a_B) * 1.0
            y = (y + branch).to(y.dtype)
            # LoraRule [b], weight 0.5
            b_A, b_B = self.adapters.b.A, self.adapters.b.B
            x = input.to(b_A.dtype)
            return (y + F.linear(F.linear(x, b_A), b_B) * 0.5).to(y.dtype)
    """)
    merge(model, "b")
    assert show(model, "0").splitlines()[:3] == [
        "# 0: Linear + LoraRule [a]",
        "# idle: LoraRule [idle]",
        "# merged into its tensors: LoraRule [b]",
    ]


def test_blocks_modes_and_writes() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [InPlaceRule("0")])
    assert show(model, "0") == lines("""
        # 0: Linear + InPlaceRule [default]
        def forward(self, input):
            y = F.linear(input, self.weight, self.bias)
            # InPlaceRule [default]
            seen, gate = self.adapters.default.seen, self.adapters.default.gate
            with torch.no_grad():
                norm = y.norm(dim=-1, keepdim=True)
                seen += 1
                norm.clamp_(min=0.1)
            hidden = y / norm
            hidden[..., 0] = 0.0
            hidden *= gate
            dropout = F.dropout(hidden, 0.5, self.training)
            return (dropout + F.dropout(y, 0.25, self.training)).to(y.dtype)
    """)
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [ModesRule("0")])
    assert show(model, "0") == lines("""
        # 0: Linear + ModesRule [default]
        def forward(self, input):
            y = F.linear(input, self.weight, self.bias)
            # ModesRule [default]
            gate = self.adapters.default.gate
            if self.training:
                noise = torch.randn_like(y)
                return (y + noise * gate).to(y.dtype)
            else:
                torch.randn_like(y)
                return y
    """)


def test_each_kind_of_call_has_its_form() -> None:
    model = apply_rules(Attention(), [TemperRule("")], example_inputs=X)
    assert show(model).count("def forward") == 1 and "# training" not in show(model)
    model(X, torch.ones(3, 3, dtype=torch.bool).triu(1))
    code = show(model)
    assert code.count("def forward") == 2 and "changed = (add * temper).to(torch.float32)" in code
    assert "# training, with gradients, mask: a tensor of rank 2 and torch.bool\ndef forward" in code
    assert "# evaluation, with gradients, mask: None\n" in code


def test_nothing_live() -> None:
    model = deactivate(apply_rules(nn.Sequential(nn.Linear(8, 8)), [rules.LoraRule("0", rank=2)]))
    assert show(model, "0") == lines("""
        # 0: Linear
        # idle: LoraRule [default]
        # no rule is live: Linear.forward runs as it is
    """)
    with pytest.raises(MatchError, match="no rule is live"):
        show(model, "0", generated=True)


def test_what_runs() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [rules.LoraRule("0", rank=2)])
    code = show(model, "0", generated=True)
    assert "low_rank_linear(" in code and "except Exception" in code


def test_functions_of_one_name_are_told_apart() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [Both("0")])
    assert "Triple.scaled(scaled(y))" in show(model, "0")
    check(model.get_submodule("0"), X)
