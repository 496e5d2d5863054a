"""Every recipe of the docs, compared with the same change written by hand into the forward.

The code of the pages runs once and defines the rules.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5
from transformers.models.vit import modeling_vit

from surgery import Rule, apply_rules, plan_rules, remove, rules_from_json, rules_to_json
from surgery.authoring import rule_names
from surgery.testing import assert_reversible
from tests.support.pages import TEXT, runs
from tests.support.sampling import sample

TASKS = (
    "change-an-output", "overwrite-a-position", "add-a-second-head", "replace-a-module", "drop-layers",
    "add-noise-in-training", "quantise-in-training", "change-gradients", "share-a-parameter", "weight-a-loss",
    "capture-activations", "patch-activations", "ablate-heads", "steer-activations", "use-a-sparse-autoencoder",
    "collect-statistics", "edit-operations", "fuse-operations", "replace-the-softmax", "edit-attention-scores",
)  # fmt: skip
PAGES = [f"docs/how-to/{task}.md" for task in TASKS]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The names that the pages define. Each page runs as a module that can be imported."""
    registry = rule_names._classes
    before, state, namespace = dict(registry), torch.get_rng_state(), SimpleNamespace()
    with contextlib.ExitStack() as stack:
        for name in PAGES:
            folder = tmp_path_factory.mktemp("page")
            module = stack.enter_context(runs_to_the_end(name, folder))
            namespace.__dict__.update(vars(module))
        yield namespace
    registry.clear()
    registry.update(before)
    torch.set_rng_state(state)


@contextlib.contextmanager
def runs_to_the_end(name: str, folder: Path) -> Iterator[Any]:
    """A page as a module, which can be imported while the context is open."""
    steps = runs(name, folder)
    modules = set(sys.modules)
    module: Any = None
    for _ in steps:
        module = module or next(sys.modules[new] for new in set(sys.modules) - modules if new.startswith("docs_"))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


# Changes by hand ----------------------------------------------------------------------------------------------------

Forward = Callable[..., Any]  # (module, its own forward, arguments …); the adapter's tensors are module.t


def by_hand(model: nn.Module, rewritten: nn.Module, changes: dict[str, Forward], paths: list[str]) -> nn.Module:
    """The model with handwritten forwards and copies of the adapter's tensors at the same modules."""
    copies: dict[int, Tensor] = {}
    for path in paths:
        module: Any = model.get_submodule(path)
        module.t = {name: copy_once(tensor, copies) for name, tensor in tensors_at(rewritten, path).items()}
        (change,) = [forward for name, forward in changes.items() if fits(name, path)]
        module.__class__ = subclass_with(type(module), change)
    return model


def tensors_at(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The adapter's tensors at a module; empty for a module without tensors."""
    adapters: Any = getattr(model.get_submodule(path), "adapters", None)
    return {} if adapters is None else adapters.default.tensors()


def fits(name: str, path: str) -> bool:
    return name == "*" or path == name or path.endswith(f".{name}")


def copy_once(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return copies[id(tensor)]


def subclass_with(base: type[nn.Module], change: Forward) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def own(*args: Any, **kwargs: Any) -> Any:
            return base.forward(self, *args, **kwargs)

        output = change(self, own, *args, **kwargs)
        floats = isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].is_floating_point()
        return output.to(args[0].dtype) if floats else output

    return type("ByHand", (base,), {"forward": forward})


@contextlib.contextmanager
def attention_by_hand(weights: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """transformers' eager attention, with `weights` in place of the softmax of the scores."""

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        scores = query @ key.transpose(2, 3) * more["scaling"]
        for added in (more.get("position_bias"), mask):
            scores = scores if added is None else scores + added
        probabilities = F.dropout(weights(module, scores).to(query.dtype), more["dropout"], module.training)
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities

    with pytest.MonkeyPatch.context() as patch:
        for modeling in (modeling_bert, modeling_llama, modeling_t5, modeling_vit):
            patch.setattr(modeling, "eager_attention_forward", eager)
        yield


# Models -------------------------------------------------------------------------------------------------------------


def llama(page: Any, **settings: Any) -> nn.Module:
    config = {**page.sizes, "vocab_size": 50, "num_hidden_layers": 1, "use_cache": False, **settings}
    return page.LlamaForCausalLM(page.LlamaConfig(**config))


def bert(page: Any, **settings: Any) -> nn.Module:
    return page.BertForSequenceClassification(
        page.BertConfig(**{**page.sizes, "vocab_size": 50, "num_hidden_layers": 1, **settings})
    )


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows * length)
    mask = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": torch.randint(2, 50, (rows, length), generator=draw), "attention_mask": mask}


def numbers(*shape: int) -> Any:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))),)


TOKENS = [tokens(2, 6), tokens(3, 4)]
NUMBERS = [numbers(2, 5, 8), numbers(3, 2, 8)]
EAGER: Any = {"attn_implementation": "eager"}
T5: Any = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


@dataclass
class Case:
    model: Callable[[Any], nn.Module]
    rule: Callable[[Any], Rule]
    changes: dict[str, Forward]
    calls: list[Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    exact: bool = True
    bf16: bool = True


# Cases: at a module -------------------------------------------------------------------------------------------------


def mlp(page: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


class RoundedAsIs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        step = weight.abs().amax(1, keepdim=True) / 7
        return weight + ((weight / step).round() * step - weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


def two_heads(self: Any, own: Any, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
    pooled = self.dropout(self.bert(input_ids, attention_mask)[1])
    t = self.t
    second = F.linear(pooled.to(t["head_weight"].dtype), t["head_weight"], t["head_bias"])
    return {"logits": self.classifier(pooled), "second_logits": second.to(pooled.dtype)}


def experts(self: Any, own: Any, x: Tensor) -> Tensor:
    t, rows = self.t, []
    for token in x.flatten(0, -2).to(self.t["gate_weight"].dtype):
        chances = torch.softmax(t["gate_weight"] @ token, 0)
        best = chances.argsort(descending=True)[:2].tolist()
        row = torch.zeros(())
        for expert in best:
            inner = F.silu(F.linear(token, t[f"experts_{expert}_0_weight"], t[f"experts_{expert}_0_bias"]))
            row = row + chances[expert] * F.linear(
                inner, t[f"experts_{expert}_2_weight"], t[f"experts_{expert}_2_bias"]
            )
        rows.append(row)
    return torch.stack(rows).view(x.shape)


def minimal_cell(self: Any, own: Any, x: Tensor, hx: Tensor) -> Tensor:
    t = self.t
    gate = torch.sigmoid(F.linear(torch.cat([x, hx], -1).to(t["gate_bias"].dtype), t["gate_weight"], t["gate_bias"]))
    new = F.linear(torch.cat([x, gate * hx], -1).to(t["gate_bias"].dtype), t["new_weight"], t["new_bias"])
    return (1 - gate) * hx + gate * torch.tanh(new)


def stochastic(self: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    change = own(x, *args, **kwargs) - x
    if self.training:
        change = change * F.dropout(torch.ones(x.shape[0], 1, 1, dtype=x.dtype), 0.5)
    return x + change


def noisy(self: Any, own: Any, ids: Tensor) -> Tensor:
    y = own(ids)
    if self.training:
        y = y + (torch.rand(y.shape, dtype=y.dtype) * 2 - 1) * 5.0 / math.sqrt(y.shape[1] * y.shape[2])
    return y


def first_vector(self: Any, own: Any, ids: Tensor) -> Tensor:
    y = own(ids)
    vector = self.t["vector"].to(y.dtype).expand(y.shape[0], 1, -1)
    return torch.cat([vector, y[:, 1:]], 1)


def kept_length(self: Any, own: Any, x: Tensor) -> Tensor:
    y = own(x)
    return y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)).detach()


AT_MODULES: dict[str, Case] = {
    "gates": Case(llama, lambda p: p.LayerScaleRule("mlp"), {"mlp": lambda m, own, x: own(x) * m.t["scale"]}, TOKENS),
    "skip": Case(
        mlp, lambda p: p.SkipRule(nn.Linear), {"*": lambda m, own, x: x + m.t["alpha"] * own(x)}, NUMBERS
    ),
    "second head": Case(bert, lambda p: p.SecondHeadRule(""), {"": two_heads}, TOKENS),
    "rms norm": Case(
        bert,
        lambda p: p.ReplaceRule(nn.LayerNorm, by=nn.RMSNorm, kwargs={"normalized_shape": 32}, inherit=True),
        {"*": lambda m, own, x: F.rms_norm(x.to(m.t["weight"].dtype), (32,), m.t["weight"])},
        TOKENS,
    ),
    "experts": Case(
        llama,
        lambda p: p.ReplaceRule("mlp", by=p.Experts, kwargs={"size": 32, "inner": 16}),
        {"mlp": experts},
        TOKENS,
        exact=False,  # each token alone is a product of another size
    ),
    "recurrent cell": Case(
        lambda p: p.Reader(),
        lambda p: p.ReplaceRule(
            nn.GRUCell, by=p.MinimalCell, kwargs={"inputs": 8, "size": 4}, inputs={"state": "hx"}
        ),
        {"cell": minimal_cell},
        NUMBERS,
    ),
    "layer drop": Case(
        lambda p: llama(p, num_hidden_layers=2),
        lambda p: p.LayerDropRule(p.LlamaDecoderLayer, layers=[1]),
        {"*": lambda m, own, x, *a, **k: x},
        TOKENS,
    ),
    "stochastic depth": Case(llama, lambda p: p.StochasticDepthRule(p.LlamaDecoderLayer), {"*": stochastic}, TOKENS),
    "noise": Case(llama, lambda p: p.NoiseRule("embed_tokens"), {"*": noisy}, TOKENS),
    "fake quantisation": Case(
        llama,
        lambda p: p.FakeQuantRule(["q_proj", "v_proj"]),
        {"*": lambda m, own, x: F.linear(x, RoundedAsIs.apply(m.weight))},
        TOKENS,
    ),
    "gradient reversal": Case(
        mlp, lambda p: p.ReversalRule("1"), {"1": lambda m, own, x: Reversed.apply(own(x))}, NUMBERS
    ),
    "shared factor": Case(
        lambda p: llama(p, num_hidden_layers=2),
        lambda p: p.SharedRule(["q_proj", "v_proj"]),
        {"*": lambda m, own, x: own(x) + x.to(m.t["A"].dtype) @ m.t["A"].t() @ m.t["B"].t()},
        TOKENS,
    ),
    "soft cap": Case(
        llama, lambda p: p.SoftCapRule("lm_head", cap=0.1), {"*": lambda m, own, x: 0.1 * torch.tanh(own(x) / 0.1)},
        TOKENS,
    ),
    "clip": Case(
        llama, lambda p: p.ClipRule("mlp", limit=0.001), {"*": lambda m, own, x: own(x).clip(-0.001, 0.001)}, TOKENS
    ),
    "first vector": Case(llama, lambda p: p.FirstVectorRule("embed_tokens"), {"*": first_vector}, TOKENS),
    "kept length": Case(llama, lambda p: p.KeepLengthRule("o_proj"), {"*": kept_length}, TOKENS),
}  # fmt: skip


# Cases: reading and steering ----------------------------------------------------------------------------------------


def patched(self: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = own(x, *args, **kwargs)
    return torch.cat([y[:, :2], self.t["activation"].to(y.dtype).expand(y.shape[0], 1, -1), y[:, 3:]], 1)


def ablated(self: Any, own: Any, x: Tensor) -> Tensor:
    head_mask = torch.ones(4).index_fill(0, torch.tensor([0, 2]), 0.0).repeat_interleave(8)
    return own(x * head_mask.to(x.dtype))


def autoencoder(self: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y, t = own(x, *args, **kwargs), self.t
    wide = y.to(t["encode_weight"].dtype)
    features = F.linear(wide, t["encode_weight"], t["encode_bias"]).to(y.dtype).relu()

    def decode(features: Tensor) -> Tensor:
        return F.linear(features.to(t["decode_weight"].dtype), t["decode_weight"], t["decode_bias"]).to(features.dtype)

    ablated_features = torch.cat([features[..., :3], torch.zeros_like(features[..., :1]), features[..., 4:]], -1)
    return decode(ablated_features) + (y - decode(features)).detach()


def steered(self: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = own(x, *args, **kwargs)
    return torch.cat([y[:, :2], (y[:, 2:] + self.t["direction"]).to(y.dtype)], 1)


def erased(self: Any, own: Any, x: Tensor) -> Tensor:
    y, direction = own(x), self.t["direction"]
    y = y.to(direction.dtype) if y.dtype != direction.dtype else y
    return (y - (y @ direction)[..., None] * direction).to(self.weight.dtype)


def averaged(self: Any, own: Any, x: Tensor) -> Tensor:
    y = own(x)
    if self.training:
        mean = self.t["mean"]
        self.t["mean"] = mean + 0.1 * (y.detach().flatten(0, 1).mean(0) - mean)
    return y


def counted(self: Any, own: Any, x: Tensor) -> Tensor:
    y = own(x)
    self.t["calls"] = self.t["calls"] + 1
    self.t["active"] = self.t["active"] + (y > 0).sum((0, 1))
    return y


READING: dict[str, Case] = {
    "patch": Case(
        llama,
        lambda p: p.PatchRule("model.layers.0", position=2, activation=[0.5] * 32),
        {"layers.0": patched},
        TOKENS,
    ),
    "ablated heads": Case(llama, lambda p: p.AblateRule("o_proj", heads=[0, 2], size=8), {"*": ablated}, TOKENS),
    "autoencoder": Case(
        llama, lambda p: p.AutoencoderRule("model.layers.0", ablated=[3]), {"layers.0": autoencoder}, TOKENS
    ),
    "steering": Case(llama, lambda p: p.SteerFromRule("model.layers.0"), {"layers.0": steered}, TOKENS),
    "erased direction": Case(
        llama, lambda p: p.EraseRule(["embed_tokens", "o_proj", "down_proj"]), {"*": erased}, TOKENS
    ),
    "running mean": Case(llama, lambda p: p.RunningMeanRule("up_proj"), {"*": averaged}, TOKENS, exact=False),
    "counts": Case(llama, lambda p: p.CountRule("act_fn"), {"*": counted}, TOKENS),
}


# Cases: inside a forward --------------------------------------------------------------------------------------------


def softmax(scores: Tensor) -> Tensor:
    return F.softmax(scores, -1, dtype=torch.float32)


def cooled(module: Any, scores: Tensor) -> Tensor:
    return softmax((scores / module.t["temperature"]).to(scores.dtype))


def with_sink(module: Any, scores: Tensor) -> Tensor:
    exp = torch.exp(scores)
    return exp / (exp.sum(-1, keepdim=True) + torch.exp(module.t["sink"]))


def with_distances(module: Any, scores: Tensor) -> Tensor:
    places = torch.arange(scores.shape[-1])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(-1, 1, 1)
    return softmax((scores - slopes * (places[None] - places[:, None]).abs()).to(scores.dtype))


def same(self: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs)


def attention(self: Any, own: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
    p = self.drop.p if self.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=0.5).transpose(1, 2).flatten(2)


def normed_attention(self: Any, own: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    scores = (q @ k.transpose(2, 3) * self.t["gain"]).to(x.dtype) / 2.0
    scores = scores if mask is None else scores + mask
    return (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


def halved(self: Any, own: Any, x: Tensor, **kwargs: Any) -> Tensor:
    x = x + 0.5 * self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
    return x + 0.5 * self.mlp(self.post_attention_layernorm(x))


def folded(self: Any, own: Any, x: Tensor) -> Tensor:
    if self.training:
        return F.relu(self.bn(self.conv(x)))
    fused = torch.nn.utils.fusion.fuse_conv_bn_weights(
        *(self.conv.weight, None, self.bn.running_mean, self.bn.running_var),
        *(self.bn.eps, self.bn.weight, self.bn.bias),
    )
    return F.relu(F.conv2d(x, *fused, padding=1))


def weighted(self: Any, own: Any, ids: Tensor, labels: Tensor) -> Tensor:
    chances = torch.log_softmax(self.head(self.embed(ids)), -1)
    losses, weights = -chances.gather(-1, labels[..., None])[..., 0], 1.0 + ids % 2
    return ((losses * weights).sum() / weights.sum()).to(losses.dtype)


IMAGES = [numbers(2, 3, 8, 8), numbers(3, 3, 6, 6)]
MASKED = [(*NUMBERS[0], torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) == 1, -1e4)), NUMBERS[1]]
LABELS = [tuple(torch.randint(0, 5, (2, 2, 6)).unbind()), tuple(torch.randint(0, 5, (2, 3, 4)).unbind())]

INSIDE: dict[str, Case] = {
    "temperature, bert": Case(
        lambda p: bert(p, **EAGER), lambda p: p.TemperatureRule("attention.self"), {"*": same}, TOKENS,
        lambda: attention_by_hand(cooled), exact=False,
    ),
    "temperature, llama": Case(
        lambda p: llama(p, **EAGER), lambda p: p.TemperatureRule("self_attn"), {"*": same}, TOKENS,
        lambda: attention_by_hand(cooled),
    ),
    "recorded scores": Case(
        lambda p: llama(p, **EAGER), lambda p: p.RecordScores("self_attn"), {"*": same}, TOKENS
    ),
    "temperature, t5": Case(
        lambda p: p.T5EncoderModel(p.T5Config(**T5, **EAGER)), lambda p: p.TemperatureRule("SelfAttention"),
        {"*": same}, TOKENS, lambda: attention_by_hand(cooled),
    ),
    "temperature, vit": Case(
        lambda p: p.ViTModel(p.ViTConfig(**{**p.sizes, "num_hidden_layers": 1}, image_size=8, patch_size=4, **EAGER)),
        lambda p: p.TemperatureRule("attention"), {"*": same}, [numbers(2, 3, 8, 8), numbers(3, 3, 8, 8)],
        lambda: attention_by_hand(cooled),
    ),
    "fused attention": Case(lambda p: p.Attention(), lambda p: p.FusedRule(p.Attention), {"": attention}, MASKED),
    "folded norm": Case(
        lambda p: nn.Sequential(p.ConvBlock(), p.ConvBlock(8, 8)), lambda p: p.FoldRule(p.ConvBlock), {"*": folded},
        IMAGES,
    ),
    "residuals": Case(llama, lambda p: p.ResidualRule(p.LlamaDecoderLayer), {"*": halved}, TOKENS),
    "sinks": Case(
        lambda p: llama(p, **EAGER), lambda p: p.SinksRule("self_attn"), {"*": same}, TOKENS,
        lambda: attention_by_hand(with_sink), exact=False,
    ),
    "distances": Case(
        lambda p: bert(p, **EAGER), lambda p: p.AlibiRule("attention.self"), {"*": same}, TOKENS,
        lambda: attention_by_hand(with_distances),
    ),
    "relu attention": Case(
        lambda p: bert(p, **EAGER), lambda p: p.ReluAttentionRule("attention.self"), {"*": same}, TOKENS,
        lambda: attention_by_hand(lambda m, scores: scores.clamp(min=0) / scores.shape[-1]),
    ),
    "relu": Case(
        lambda p: p.Mlp(), lambda p: p.ReluRule(p.Mlp),
        {"": lambda m, own, x: m.down(m.up(x).clamp(min=0)).clamp(min=0)}, NUMBERS,
    ),
    "weighted loss": Case(
        lambda p: p.Tagger(), lambda p: p.WeightedRule(p.Tagger), {"": weighted}, LABELS, exact=False
    ),
    "query and key norms": Case(
        lambda p: p.Attention(), lambda p: p.QueryKeyRule(p.Attention), {"": normed_attention}, MASKED, exact=False
    ),
}  # fmt: skip

CASES = {**AT_MODULES, **READING, **INSIDE}


# Checks -------------------------------------------------------------------------------------------------------------


def call_model(model: nn.Module, call: Any, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    output = model(**call) if isinstance(call, dict) else model(*call)
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def assert_same(outputs: list[Tensor], wanted: list[Tensor], exact: bool, label: str, **tolerance: Any) -> None:
    assert len(outputs) == len(wanted), label
    for output, want in zip(outputs, wanted, strict=True):
        if exact:
            assert torch.equal(output, want), f"{label}: off by {(output.float() - want.float()).abs().max()}"
        else:
            torch.testing.assert_close(output, want, msg=lambda text: f"{label}: {text}", **tolerance)


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([output.float().square().mean() for output in outputs if output.requires_grad]).sum()


def rewrite_model(page: Any, case: Case, model: nn.Module) -> nn.Module:
    apply_rules(model, case.rule(page), example_inputs=case.calls[0], freeze=False)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=draw) * 0.1).to(parameter.dtype))
    return model


def build_both(page: Any, case: Case, dtype: Any = torch.float32) -> tuple[nn.Module, nn.Module, list[str]]:
    torch.manual_seed(0)
    base = case.model(page)
    if any(isinstance(module, nn.BatchNorm2d) for module in base.modules()):
        base.train()
        for _ in range(3):
            base(torch.randn(2, 3, 8, 8) + 1)
    plain = copy.deepcopy(base.eval().to(dtype))
    paths = [step.path for step in plan_rules(plain, case.rule(page), example_inputs=case.calls[0]).steps]
    return plain, rewrite_model(page, case, base), paths


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_a_step_of_training(page: Any, name: str) -> None:
    case = CASES[name]
    plain, model, paths = build_both(page, case)
    plain = by_hand(plain, model, case.changes, paths)
    for mode in (False, True):
        for call in case.calls:
            outputs = call_model(model.train(mode), call)
            with case.around():
                assert_same(outputs, call_model(plain.train(mode), call), case.exact, f"training {mode}")
    own, others = pair_trained(model, plain, paths)
    for step in (0, 1):
        grads = torch.autograd.grad(loss_of(call_model(model, case.calls[0], step)), own, allow_unused=True)
        with case.around():
            wanted = torch.autograd.grad(loss_of(call_model(plain, case.calls[0], step)), others, allow_unused=True)
        for pair in zip(grads, wanted, strict=True):
            torch.testing.assert_close(*(grad if grad is not None else torch.zeros(()) for grad in pair), **SUMS)
        take_step(own, grads)
        take_step(others, wanted)
    outputs = call_model(model, case.calls[0])
    with case.around():
        assert_same(outputs, call_model(plain, case.calls[0]), False, "after two steps", **SUMS)
    for path in paths:
        other: Any = plain.get_submodule(path)
        for key, tensor in tensors_at(model, path).items():
            torch.testing.assert_close(tensor, other.t[key], **SUMS)


SUMS: Any = {"rtol": 1e-4, "atol": 1e-6}  # gradients are added up in another order


def pair_trained(model: nn.Module, plain: nn.Module, paths: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The trained tensors of the rewritten model, and the same tensors of the handwritten model."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    named = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        pairs[id(named[name])] = named[name], parameter
    for path in paths:
        other: Any = plain.get_submodule(path)
        tensors = tensors_at(model, path).items()
        pairs.update({id(tensor): (tensor, other.t[key]) for key, tensor in tensors if tensor.requires_grad})
    own, others = zip(*pairs.values(), strict=True) if pairs else ((), ())
    return list(own), list(others)


def take_step(tensors: list[Tensor], grads: Any) -> None:
    with torch.no_grad():
        for tensor, grad in zip(tensors, grads, strict=True):
            if grad is not None:
                tensor.sub_(grad, alpha=0.01)


@pytest.mark.parametrize("name", sample(CASES, 4))
def test_copies_compile_export_and_removal(page: Any, name: str) -> None:
    case = CASES[name]
    plain, model, _ = build_both(page, case)
    wanted = call_model(model, case.calls[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of torch
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        args, kwargs = ((), case.calls[0]) if isinstance(case.calls[0], dict) else (case.calls[0], {})
        exported: Any = torch.export.export(copy.deepcopy(model), args, kwargs).module()
    pickled = pickle.loads(pickle.dumps(model))
    others = {"deepcopy": copy.deepcopy(model), "pickle": pickled, "compile": compiled, "export": exported}
    if name == "second head":  # documented on the page: transformers builds a ModelOutput from its own fields only
        with pytest.raises(TypeError, match="second_logits"):
            call_model(others.pop("export"), case.calls[0])
    for form, other in others.items():
        assert_same(call_model(other, case.calls[0]), wanted, True, form)
    torch.compiler.reset()
    rules = [case.rule(page)]
    assert rules_from_json(rules_to_json(rules)) == rules
    remove(model)
    for call in case.calls:
        assert_same(call_model(model, call), call_model(plain, call), True, "removed")
    assert_reversible(plain, rules, example_inputs=case.calls[0])


@pytest.mark.parametrize("name", sample(CASES, 2))
def test_half_precision(page: Any, name: str) -> None:
    case = CASES[name]
    call = in_bfloat16(case.calls[0])
    plain, model, paths = build_both(page, replace(case, calls=[call]), torch.bfloat16)
    plain = by_hand(plain, model, case.changes, paths)
    outputs = call_model(model, call)
    with case.around():
        wanted = call_model(plain, call)
    assert [each.dtype for each in outputs] == [each.dtype for each in wanted]
    # bfloat16 has eight bits, and the two models may round at different operations
    assert_same(outputs, wanted, False, "bfloat16", rtol=0.05, atol=0.02)
    loss_of(call_model(model.train(), call)).backward()


def in_bfloat16(call: Any) -> Any:
    if isinstance(call, dict):
        return call
    return tuple([part.bfloat16() if part.is_floating_point() else part for part in call])


def test_queries_keys_and_values(page: Any) -> None:
    torch.manual_seed(0)
    model = llama(page).eval()
    wanted, taken = call_model(model, TOKENS[0]), dict[str, Tensor]()
    hooks = [
        module.register_forward_hook(lambda module, args, y, path=path: taken.update({path: y}))
        for path, module in model.named_modules()
        if path.endswith(("q_proj", "k_proj", "v_proj"))
    ]
    call_model(model, TOKENS[0])
    for hook in hooks:
        hook.remove()
    apply_rules(model, page.CaptureRule(["q_proj", "k_proj", "v_proj"]))
    with page.captured(model) as captures:
        assert_same(call_model(model, TOKENS[0]), wanted, True, "captured")
    assert taken.keys() == dict(captures).keys() and all(torch.equal(captures[path][0], taken[path]) for path in taken)


def test_every_rule_on_the_pages_is_compared(page: Any) -> None:
    named = {word for name in PAGES for word in re.findall(r"^class (\w+)\(Rule\)", TEXT[name], re.MULTILINE)}
    compared = {type(case.rule(page)).__name__ for case in CASES.values()}
    assert named <= compared, named - compared
