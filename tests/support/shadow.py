"""A model and its adapters by hand: what `test_state_machine.py` compares with. No code of the engine runs here.

`Shadow` knows the base's tensors, each adapter's tensors, whether it is live and with which weight, and computes in
float64 by the formulas of the papers: W x + Σ weight · scale · B A x, and so on. It also says what must be refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, WORDS = 6, 11
LINEAR = ("up", "down", "head", "last")
SITES = ("embed", "norm", "up", "down", "conv", "head", "last")


class Body(nn.Module):
    """One module of each kind; `up` runs twice, and the head may share the embedding's weight."""

    def __init__(self, tied: bool = False, groups: int = 1, padding: int | None = None):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.last = nn.Linear(WORDS, 4)
        if tied:
            self.head.weight = self.embed.weight
        self.last.register_forward_hook(unchanged)

    def forward(self, ids: Tensor) -> Tensor:
        return flow(self, ids)


def unchanged(module: nn.Module, args: Any, output: Any) -> None:
    """A user's hook, which must stay."""


def flow(parts: Any, ids: Tensor) -> Tensor:
    x = parts.norm(parts.embed(ids))
    for _ in range(2):
        x = x + parts.down(torch.tanh(parts.up(x)))
    x = x + parts.conv(x.transpose(1, 2)).transpose(1, 2)
    return parts.last(torch.tanh(parts.head(x)).mean(1))


@dataclass(eq=False)
class Entry:
    """One rule at one site: its formula, its tensors, and the `requires_grad` they have while they are live."""

    kind: str  # "lora", "ia3", "train" or "bottleneck"
    path: str
    scale: float = 1.0
    rank: int = 0
    dora: bool = False
    fed: bool = False  # IA3 on the input; a bottleneck beside the module
    start: str = ""  # "pissa" took its start out of the base's weight
    tensors: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)

    def copied(self) -> Entry:
        return replace(self, tensors={n: t.clone() for n, t in self.tensors.items()}, flags=dict(self.flags))


@dataclass
class Held:
    entries: list[Entry]
    live: bool = True
    weight: float = 1.0
    dropout: bool = False
    freezes: bool = True

    @property
    def changed(self) -> bool:
        return any(entry.start for entry in self.entries)

    @property
    def paths(self) -> set[str]:
        return {entry.path for entry in self.entries}

    def copied(self) -> Held:
        return replace(self, entries=[entry.copied() for entry in self.entries])


Weights = Mapping[str, float]


class Shadow:
    def __init__(self, plain: Body):
        self.plain = plain  # the base before the first adapter, which must be restored after the last
        self.adapters: dict[str, Held] = {}
        self.merged: tuple[str, ...] = ()
        self.moved: dict[str, Tensor] = {}  # weights of the base that adapters changed at their start

    # What it computes -------------------------------------------------------------------------------------------

    def live(self) -> dict[str, float]:
        return {name: adapter.weight for name, adapter in self.adapters.items() if adapter.live}

    def output(self, ids: Tensor, weights: Weights | None = None, leaves: Mapping[int, Tensor] | None = None) -> Tensor:
        """The output with these weights. By default: the live adapters, and the merged ones with weight 1."""
        if weights is None:
            weights = {**dict.fromkeys(self.merged, 1.0), **self.live()}
        entries = [
            (e, weights[name]) for name, adapter in self.adapters.items() if name in weights for e in adapter.entries
        ]
        parts = {}
        for path in SITES:
            pairs = [(e, weight) for e, weight in entries if e.path == path]
            parts[path] = lambda x, path=path, pairs=pairs: self._site(path, pairs, x, leaves or {})
        return flow(SimpleNamespace(**parts), ids)

    def _site(self, path: str, pairs: list[tuple[Entry, float]], x: Tensor, leaves: Mapping[int, Tensor]) -> Tensor:
        module: Any = self.plain.get_submodule(path)
        parameters: dict[str, Tensor] = dict(module.named_parameters())
        moved = {n: self.moved[f"{path}.{n}"] for n in parameters if f"{path}.{n}" in self.moved}
        own = {name: tensor.detach().double() for name, tensor in {**parameters, **moved}.items()}
        tensors = {id(e): {n: leaves.get(id(t), t.double()) for n, t in e.tensors.items()} for e, _ in pairs}
        for entry, weight in pairs:
            if entry.kind == "train":
                own = {name: t + weight * (tensors[id(entry)][name] - t) for name, t in own.items()}
            if entry.kind == "ia3" and entry.fed:
                scale = tensors[id(entry)]["scale"]
                scale = scale[:, None] if path == "conv" else scale
                x = x + weight * (x * scale - x)
        y = _run(module, x, own["weight"], own.get("bias"))
        plain = y if own.get("bias") is None or path not in LINEAR else y - own["bias"]
        for entry, weight in pairs:
            t = tensors[id(entry)]
            if entry.kind == "lora":
                branch = entry.scale * _branch(module, x, t["A"], t["B"])
                if "B_bias" in t:
                    bias = entry.scale * t["B_bias"]
                    branch = branch + (bias[:, None] if path == "conv" else bias)
                if entry.dora:
                    changed = own["weight"] + entry.scale * t["B"] @ t["A"]
                    gain = t["magnitude"].flatten() / changed.norm(dim=1).detach()
                    branch = (gain - 1) * plain + gain * branch
                y = y + weight * branch
            elif entry.kind == "ia3" and not entry.fed:
                scale = t["scale"][:, None] if path == "conv" else t["scale"]
                y = y + weight * (y * scale - y)
            elif entry.kind == "bottleneck":
                inner = torch.relu(F.linear(x if entry.fed else y, t["down"], t["down_bias"]))
                y = y + weight * F.linear(inner, t["up"], t["up_bias"])
        return y

    # What must be refused ---------------------------------------------------------------------------------------

    def merged_paths(self) -> set[str]:
        return {path for name in self.merged for path in self.adapters[name].paths}

    def cannot_switch(self, live: Weights, explicit: bool = True) -> str:
        before = self.live()
        if explicit and any(not self.adapters[name].live for name in self.merged):
            return "merged, and not to be live"
        changing = [name for name in self.adapters if before.get(name) != live.get(name)]
        if any(self.adapters[name].paths & self.merged_paths() for name in changing):
            return "merged"
        if any(self.adapters[name].changed and live.get(name) != 1 for name in changing):
            return "its start is in the base"
        touched = {path for name in changing for path in self.adapters[name].paths}
        return "hidden" if self._hidden([n for n in self.adapters if n in live], touched) else ""

    def cannot_apply(self, name: Any, entries: Sequence[Entry], idle: bool = False) -> str:
        if name in (None, 3, "", "x.y", "forward", "class", 'a"', "a\nb") or name in self.adapters:
            return "name"
        if self.merged and not idle:
            return "merged"
        if clash(entries):
            return "clash"
        if any(entry.start and entry.path in ("embed", "head") and self.tied for entry in entries):
            return "shared"
        trained = {entry.path for entry in entries if entry.kind == "train"}
        others = {
            e.path for adapter in self.adapters.values() if adapter.live for e in adapter.entries if e.kind == "train"
        }
        return "hidden" if trained & others and not idle else ""

    def cannot_merge(self, names: Sequence[str], untie: bool) -> str:
        if self.merged:
            return "merged"
        for path in {path for name in names for path in self.adapters[name].paths}:
            chosen = [e for name in names for e in self.adapters[name].entries if e.path == path]
            beside = [
                e
                for name, adapter in self.adapters.items()
                if adapter.live and name not in names
                for e in adapter.entries
                if e.path == path
            ]
            if any(e.kind == "bottleneck" for e in chosen):
                return "an activation"
            if beside and not all(e.kind == "lora" and not e.dora for e in [*chosen, *beside]):
                return "order"
            if sum(e.kind == "train" for e in chosen) > 1:
                return "hidden"
            if path in ("embed", "head") and self.tied and not untie:
                return "shared"
        return ""

    def cannot_remove(self, names: Sequence[str]) -> str:
        merged = self.merged_paths()
        for name in names:
            adapter = self.adapters[name]
            in_weights = adapter.live or name in self.merged
            if any(entry.path in merged and (in_weights or entry.start) for entry in adapter.entries):
                return "merged"
        staying: set[str] = set()
        for name, adapter in reversed(self.adapters.items()):
            mine = {entry.path for entry in adapter.entries if entry.start}
            if name in names and mine & staying:
                return "a later one is on top of it"
            if name not in names:
                staying |= mine
        return ""

    def cannot_route(self, names: Sequence[str | None]) -> str:
        requested = {name for name in names if name is not None}
        touched = [name for name, adapter in self.adapters.items() if name in requested or adapter.live]
        if any(self.adapters[name].paths & self.merged_paths() for name in [*touched, *self.merged]):
            return "merged"
        for name, adapter in self.adapters.items():
            if adapter.changed and not (len(set(names)) == 1 and name in requested):
                return "its start is in the base"
        return ""

    def cannot_combine(self, weights: Weights, into: Any, method: str) -> str:
        if self.merged:
            return "merged"
        entries = self.combined_entries(weights)
        if problem := self.cannot_apply(into, entries, idle=True):
            return problem
        if any(self.adapters[name].changed for name in weights):
            return "its start is in the base"
        for entry in entries:
            shares = self.shares(weights, entry)
            alone = len(shares) == 1 and shares[0][0] == 1 and method in ("linear", "cat")
            lora = [e for _, e in shares if e.kind == "lora"]
            if any(e.dora for e in lora) and not alone and method != "svd":
                return "DoRA"
            if lora and not (alone and lora[0].dora) and method == "linear" and len({e.rank for e in lora}) > 1:
                return "ranks"
            if entry.kind == "ia3" and not (alone and not self._absent(weights, entry)):
                if len({e.fed for _, e in shares}) > 1:
                    return "scales"
            if entry.kind == "bottleneck" and not alone and (method == "cat" or len({e.fed for _, e in shares}) > 1):
                return "averages"
        return ""

    def _hidden(self, names: Sequence[str], touched: set[str]) -> bool:
        trained = [e.path for n in names for e in self.adapters[n].entries if e.kind == "train" and e.path in touched]
        return len(set(trained)) < len(trained)

    @property
    def tied(self) -> bool:
        return self.plain.head.weight is self.plain.embed.weight

    # Combining --------------------------------------------------------------------------------------------------

    def shares(self, weights: Weights, like: Entry) -> list[tuple[float, Entry]]:
        return [
            (weights[name], entry)
            for name, adapter in self.adapters.items()
            if name in weights
            for entry in adapter.entries
            if (entry.kind, entry.path) == (like.kind, like.path)
        ]

    def _absent(self, weights: Weights, like: Entry) -> float:
        """The sum of the weights of the adapters without an entry of this kind at this site."""
        at = (like.kind, like.path)
        return sum(
            w for name, w in weights.items() if at not in {(e.kind, e.path) for e in self.adapters[name].entries}
        )

    def combined_entries(self, weights: Weights) -> list[Entry]:
        """One for each kind and site, in the order in which the adapters' own are at the sites; without tensors."""
        entries: dict[tuple[str, str], Entry] = {}
        for name, adapter in self.adapters.items():
            for entry in adapter.entries if name in weights else []:
                entries.setdefault((entry.kind, entry.path), replace(entry, tensors={}, flags={}))
        return list(entries.values())

    def sums(self, weights: Weights, entry: Entry, method: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Checks of a combined entry's tensors: (name, actual value, expected value)."""
        shares, t = self.shares(weights, entry), {n: t.double() for n, t in entry.tensors.items()}
        if entry.kind == "lora" and not entry.dora:
            if method == "linear":
                for name in "AB":
                    roots = [math.copysign(abs(w * e.scale) ** 0.5, w if name == "A" else 1) for w, e in shares]
                    terms = [root * e.tensors[name].double() for root, (_, e) in zip(roots, shares, strict=True)]
                    yield name, t[name], torch.stack(terms).sum(0)
            elif not any(e.dora for _, e in shares) and (
                method == "cat" or entry.rank >= sum(e.rank for _, e in shares)
            ):
                module = self.plain.get_submodule(entry.path)
                eye = _inputs(module)
                terms = [w * e.scale * _branch(module, eye, e.tensors["A"], e.tensors["B"]).double() for w, e in shares]
                yield "ΔW", _branch(module, eye, t["A"], t["B"]), torch.stack(terms).sum(0)
            if "B_bias" in t:
                terms = [w * e.scale * e.tensors["B_bias"].double() for w, e in shares if "B_bias" in e.tensors]
                yield "bias", t["B_bias"], torch.stack(terms).sum(0)
        elif entry.kind == "train":
            for name, p in self.plain.get_submodule(entry.path).named_parameters():
                base = self.moved.get(f"{entry.path}.{name}", p).detach().double()
                yield (
                    name,
                    t[name],
                    base + torch.stack([w * (e.tensors[name].double() - base) for w, e in shares]).sum(0),
                )
        elif entry.kind == "ia3":
            scales = torch.stack([w * e.tensors["scale"].double() for w, e in shares])
            sum_of_changes = 1 - sum(w for w, _ in shares)  # 1 + Σ w (s − 1); "linear" is PEFT's Σ w s
            more = self._absent(weights, entry) if method == "linear" else sum_of_changes
            yield "scale", t["scale"], scales.sum(0) + more
        elif entry.kind == "bottleneck":
            for name, tensor in t.items():
                yield name, tensor, torch.stack([w * e.tensors[name].double() for w, e in shares]).sum(0)


def clash(entries: Sequence[Entry]) -> bool:
    """Whether they can't be one adapter: a kind twice at a site, or a module's own copy beside something else."""
    by_path: dict[str, list[str]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry.kind)
    return any(len(set(kinds)) < len(kinds) or ("train" in kinds and len(kinds) > 1) for kinds in by_path.values())


def _run(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight, module.padding_idx)  # no gradient for the padding
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.Conv1d):
        return F.conv1d(x, weight, bias, padding=1, groups=module.groups)
    return F.linear(x, weight, bias)


def _branch(module: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if isinstance(module, nn.Embedding):
        return F.embedding(x, A.t(), module.padding_idx) @ B.t()
    if isinstance(module, nn.Conv1d):
        return F.conv1d(F.conv1d(x.to(A.dtype), A, padding=1, groups=module.groups), B, groups=module.groups)
    return x.to(A.dtype) @ A.t() @ B.t()


def _inputs(module: Any) -> Tensor:
    """Inputs that determine a linear map."""
    if isinstance(module, nn.Embedding):
        return torch.arange(WORDS)
    if isinstance(module, nn.Conv1d):
        return torch.eye(3 * WIDTH, dtype=torch.float64).view(-1, WIDTH, 3)
    return torch.eye(module.in_features, dtype=torch.float64)
