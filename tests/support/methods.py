"""The methods beside LoRA as a table: rules, formulas, layers, and their names and tensors in PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Rule
from surgery.rules import BoftRule, HraRule, IA3Rule, LohaRule, LokrRule, MissRule, OftRule, RoadRule, VeraRule
from tests.support.method_formulas import Changed, Params, boft, hra, ia3, loha, lokr, miss, oft, road, vera

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import peft
    except ImportError:
        peft: Any = None
    from transformers.pytorch_utils import Conv1D


needs_peft = pytest.mark.skipif(peft is None, reason="compares with PEFT")
reproduced = pytest.mark.skipif(
    peft is None or peft.__version__ != "0.21.2",
    reason="the failure was seen in PEFT 0.21.2; other versions may not have it",
)


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


@dataclass
class Method:
    rule: Rule
    by_hand: Callable[[Tensor, Tensor, Params, Any], Changed]
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


def cases(attribute: str = "layers", among: tuple[str, ...] = tuple(LAYERS)) -> Any:
    """Each method with each of its layers."""
    actual = ((name, layer) for name, method in METHODS.items() for layer in getattr(method, attribute))
    return pytest.mark.parametrize("name, layer", [(name, layer) for name, layer in actual if layer in among])


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
    params: Any = model.get_submodule("m.adapters.default")
    with torch.no_grad():
        for parameter in params.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return params.tensors()


def expected_of(model: Any, base: Any, method: Method, params: Params) -> tuple[dict[str, Tensor], Tensor]:
    """The weight and bias that the method gives the layer, worked out by hand."""
    turned = isinstance(base.m, Conv1D)
    weight = base.m.weight.detach().T if turned else base.m.weight.detach()
    bias = torch.zeros(len(weight)) if base.m.bias is None else base.m.bias.detach()
    changed, shifted = method.by_hand(weight, bias, params, method.rule)
    result = {"m.weight": changed.T if turned else changed}
    return result if base.m.bias is None else {**result, "m.bias": shifted}, bias  # type: ignore[return-value]


def assert_close(actual: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal to within a few float32 roundings of the largest entry: sums are taken in another order."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= slack * max(1.0, float(expected.abs().max().detach()))


def in_peft(model: nn.Module, method: Method, **fields: Any) -> Any:
    config = getattr(peft, PEFTS[type(method.rule)][0])(target_modules=["m"], **{**method.fields, **fields})
    return peft.get_peft_model(copy.deepcopy(model), config)


def theirs_of(layer: Any, method: Method) -> dict[str, Tensor]:
    """PEFT's tensors under our names: parameters where they are trained."""
    result: dict[str, Tensor] = {}
    for name, path in PEFTS[type(method.rule)][1].items():
        if "{}" in path:
            result[name] = layer.get_parameter(path.format("default"))
        elif "default" in (params := getattr(layer, path)):
            result[name] = params["default"]
    if isinstance(method.rule, VeraRule):
        result["A"] = layer.vera_A["default"][:, : layer.in_features]
        result["B"] = layer.vera_B["default"][: layer.out_features]
    return result


def take_over(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    assert {name for name in ours if name != "index"} == theirs.keys()
    with torch.no_grad():
        for name, tensor in theirs.items():
            assert tensor.numel() == ours[name].numel(), name
            if name not in ("scale", "s"):  # PEFT keeps these in the shape of a layer's output
                assert tensor.shape == ours[name].shape, name
            ours[name].copy_(tensor.view(ours[name].shape))
