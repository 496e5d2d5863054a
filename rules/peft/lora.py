"""LoRA in PEFT's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules._linear.layouts import column_norm, layout_of
from surgery.rules._low_rank.rule import sure
from surgery.rules._shared import path_patterns
from surgery.rules._shared.text_calls import last_tokens
from surgery.rules.lora import LoraRule
from surgery.rules.peft.extras import biases_beside
from surgery.rules.peft.tied_modules import NAMES, embedding_path, targeted_group, tied_paths

SURGERY = 'save_adapter(…, format="surgery") holds any rules'


@peft_method
class Lora(PeftMethod):
    peft_type, rule = "LORA", LoraRule
    lacks, biased = (), True
    init_field = "init_lora_weights"
    inits = {
        True: "kaiming", False: "random", "gaussian": "gaussian", "orthogonal": "orthogonal", "eva": "kaiming",
        "pissa": "pissa", "olora": "olora", "mica": "mica",
    }  # fmt: skip
    fields = {
        "r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout", "use_dora": "dora",
        "lora_bias": "lora_bias", "bias": "bias",
    }  # fmt: skip
    tensors = {
        "A": "lora_A.weight", "B": "lora_B.weight", "B_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
    }  # fmt: skip
    passed_over = ("lora_velora_embed",)
    marks = ("lora_A.weight", "lora_embedding_A")

    def call_context(self, keywords: dict[str, Any]) -> AbstractContextManager[Any]:
        counts = keywords.pop("alora_offsets", None)
        return nullcontext() if counts is None else last_tokens(counts)

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        start = config.data.get("init_lora_weights")
        if isinstance(start, str) and start.lower() in ("gaussian", "olora", "mica"):  # which PEFT takes in any case
            config.data["init_lora_weights"] = start.lower()
            if start.lower() == "mica" != start:
                config.notes.append(f"PEFT would train B, too, with {start!r}: it stays fixed, as with 'mica'")
        if config.data.get("target_parameters") and not config.data.get("target_modules"):
            config.take("target_modules")
            return []
        return self._with_tied(config, *super().read(config))

    def _with_tied(self, config: PeftConfig, rule: Any) -> Iterable[Rule]:
        """The rule, and one with shared factors for the modules that `ensure_weight_tying` ties."""
        group = targeted_group(config)
        others = sorted(config.targeted.difference(group)) if group else []
        if not group:
            yield rule
            return
        for paths, more in ((others, {}), (group, {"tied": True, "bias": "none" if others else rule.bias})):
            if paths:
                yield rule.replace(
                    targets=config.regular(paths), exclude=(), layers=None, **_patterns(rule, paths), **more
                )

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        if config.data.get("init_lora_weights") == "eva":  # of a saved adapter it is past
            raise config.refuse("init_lora_weights", "this start is not supported")
        start = config.data.get("init_lora_weights")
        if not (isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start)):
            return self.read(config)
        config.data["init_lora_weights"] = "pissa"  # a saved adapter with this start can't be made again exactly
        return [rule.replace(init=start) if isinstance(rule, LoraRule) else rule for rule in self.read(config)]

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.take("fan_in_fan_out")  # how a weight lies is the module's own affair
        if config.take("use_qalora") is not None and config.data["use_qalora"]:
            raise config.refuse("use_qalora", "it pools the input of quantised layers")
        if config.take("velora_config"):
            config.notes.append(
                "velora_config is passed over: VeLoRA saves memory while training, which is not done here"
            )
        beside = {"bias": "none"} if biases_beside(config) else {}
        invocation = config.take("alora_invocation_tokens") or None  # an empty list is none to PEFT
        patterns = {name: config.fitting(name) for name in ("rank_pattern", "alpha_pattern")}
        return {**patterns, "invocation": invocation, **beside}

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        if isinstance(place.module, nn.MultiheadAttention):
            return _attention(place)
        if place.rule.tied and not isinstance(place.module, nn.Embedding):  # type: ignore[attr-defined]
            return {"A": _transposed("lora_B.weight"), "B": _transposed("lora_A.weight")}
        if isinstance(place.module, nn.Embedding):
            return {**super().entries(place), **{name: PeftEntry(f"lora_embedding_{name}") for name in "AB"}}
        groups = getattr(place.module, "groups", 1)
        by_group = {"A": _by_group(groups)} if groups != 1 else {}
        if by_group and "magnitude" in place.names:
            by_group["magnitude"] = _magnitude(place, groups, by_group["A"])
        return super().entries(place) | by_group

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        tied = [path for rule, paths in placed if rule.tied for path in paths]
        bias = next((rule.bias for rule, _ in placed if not rule.tied), placed[0][0].bias)
        placed = [(rule.replace(tied=False, bias=bias) if rule.tied else rule, paths) for rule, paths in placed]
        placed = [(_after_loftq(rule), paths) for rule, paths in placed]
        placed = [(rule if rule.max_rank is None else _fill_rank(rule, paths), paths) for rule, paths in placed]
        single = placed[0][0] if len(placed) == 1 else _as_one(placed)
        paths = [path for _, inner in placed for path in inner]
        for path in paths:
            groups = getattr(modules.by_path[path], "groups", 1)
            if single.rank_at(path) % groups:
                raise _unsupported("a rank that the groups of a convolution don't divide", path)
        config = super().write([(single, paths)], modules)
        if tied:
            _check_tied(tied, config["target_modules"], modules)
            config["ensure_weight_tying"] = True
        return config

    def write_fields(self, rule: Rule) -> dict[str, Any]:
        assert isinstance(rule, LoraRule)
        patterns: dict[str, Any] = {
            "rank_pattern": dict(rule.rank_pattern or {}), "alpha_pattern": dict(rule.alpha_pattern or {})
        }  # fmt: skip
        if rule.invocation is not None:
            if rule.init == "mica":
                raise _unsupported("an invocation with init='mica'")
            patterns["alora_invocation_tokens"] = list(rule.invocation)
            patterns["task_type"] = "CAUSAL_LM"  # only PEFT's class of this task looks for the tokens
        if not rule.lora_bias:
            return patterns
        if rule.dora or rule.init not in ("kaiming", "random", "gaussian", "orthogonal"):
            raise _unsupported("lora_bias with DoRA, or with a start from the weight")
        return {**patterns, "init_lora_weights": True}  # PEFT knows no other start beside it; of a file it is past


def _patterns(rule: LoraRule, paths: Sequence[str]) -> dict[str, Any]:
    """The rule's patterns without those that fit none of the paths."""
    patterns: dict[str, Any] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        values = getattr(rule, name) or {}
        unused = path_patterns.unused(values, paths)
        patterns[name] = {key: value for key, value in values.items() if key not in unused} or None
    return patterns


def _as_one(placed: Sequence[tuple[LoraRule, Sequence[str]]]) -> LoraRule:
    """Several rules that differ in rank and alpha as one with patterns of paths."""
    (first, _), same = placed[0], ("dropout", "dora", "lora_bias", "bias", "rslora", "init", "invocation")
    if any(getattr(rule, name) != getattr(first, name) for rule, _ in placed for name in same):
        raise _unsupported("LoraRules that differ in more than targets, rank and alpha")
    by_path = {path: rule for rule, paths in placed for path in paths}
    ranks = {re.escape(path): rule.rank_at(path) for path, rule in by_path.items()}
    alphas = {re.escape(path): rule.alpha_at(path) for path, rule in by_path.items()}
    targets = "re:" + "|".join(map(re.escape, by_path))
    return first.replace(targets=targets, exclude=(), layers=None, rank_pattern=ranks, alpha_pattern=alphas)


def _after_loftq(rule: LoraRule) -> LoraRule:
    """A rule whose start kept the codes as an ordinary one: of a saved adapter the start is past."""
    if rule.init != "loftq":
        return rule
    if rule.loftq_steps > 1:
        raise _unsupported("init='loftq' with several steps, which changes the base's codes")
    return rule.replace(init="kaiming", loftq_base=None)


def _fill_rank(rule: LoraRule, paths: Sequence[str]) -> LoraRule:
    """A rule with more room than rank as one that uses all of it, at the same scale."""
    rank = rule.max_rank
    assert rank is not None
    alphas = {path: rule.scale_at(path) * rank for path in paths}
    alpha = alphas[paths[0]] if paths else rule.alpha
    others = {re.escape(path): value for path, value in alphas.items() if value != alpha}
    plain = {"rank_pattern": None, "rslora": False, "max_rank": None}
    filled = rule.replace(rank=rank, alpha=alpha, alpha_pattern=others or None, **plain)
    for path in paths:
        if filled.scale_at(path) != rule.scale_at(path):
            raise _unsupported(f"the scale of max_rank={rank} to the last bit", path)
    return filled


def _by_group(groups: int) -> PeftEntry:
    """PEFT's A looks at all channels of a convolution with groups. Ours is such a one, zero outside its group."""

    def read(A: Tensor) -> Tensor:
        blocks = A.unflatten(0, (groups, -1)).unflatten(
            2, (groups, -1)
        )  # (groups, rank / groups, groups, in / groups, …)
        own = torch.stack([blocks[i, :, i] for i in range(groups)])
        if not A.is_meta and int(blocks.count_nonzero()) > int(own.count_nonzero()):
            raise _unreadable("it looks at all channels of a convolution with groups: no kernel with groups does that")
        return own.flatten(0, 1)

    def write(A: Tensor) -> Tensor:
        own = A.unflatten(0, (groups, -1))
        blocks = own.new_zeros(groups, own.shape[1], groups, *own.shape[2:])
        for i in range(groups):
            blocks[i, :, i] = own[i]
        return blocks.flatten(2, 3).flatten(0, 1)

    return PeftEntry("lora_A.weight", read, write)


def _magnitude(place: PeftPlace, groups: int, of_A: PeftEntry) -> PeftEntry:
    """PEFT divides the magnitude by the norms of another matrix: B and A multiplied as if there were no groups.

    So the number in the file is our gain, times that norm: both compute the same.
    """
    rule: Any = place.rule

    def ratio() -> Tensor:
        A, B = place.values("A"), place.values("B")
        (part,) = sure(layout_of(place.module, len(A))).parts
        weight, scale, every = place.base("weight").to(A), rule.scale_at(place.path), of_A.write(A)
        mixed = (B.reshape(-1, len(A)) @ every.flatten(1)).reshape(weight.shape)
        own, theirs = (column_norm(part, weight + scale * delta) for delta in (part.delta(A, B), mixed))
        nothing = own.eq(0) | theirs.eq(0)  # features of zeros, whose output is zero with any magnitude
        return (theirs / own.masked_fill(nothing, 1.0)).masked_fill(nothing, 1.0)

    def read(magnitude: Tensor) -> Tensor:
        return magnitude if magnitude.is_meta else (magnitude / ratio().to(magnitude.device)).to(magnitude.dtype)

    def write(magnitude: Tensor) -> Tensor:
        return (magnitude * ratio().to(magnitude.device)).to(magnitude.dtype)

    return PeftEntry("lora_magnitude_vector", read, write)


def _transposed(key: str) -> PeftEntry:
    return PeftEntry(key, lambda tensor: tensor.t(), lambda tensor: tensor.t().contiguous())


def _check_tied(tied: Sequence[str], targets: Any, modules: Any) -> None:
    """Raises where PEFT would share A and B between other modules."""
    embedding, others = embedding_path(modules), tied_paths(modules)
    if embedding is None or not others or set(tied) != {embedding, *others}:
        raise _unsupported("tied factors of other modules than the embedding and all that share its weight", tied[0])
    named = [name for name in NAMES if isinstance(targets, str) and re.fullmatch(targets, name)]
    named += [] if isinstance(targets, str) else [name for name in targets if name.rpartition(".")[2] in NAMES]
    if not named:
        raise _unsupported(f"tied factors where none of the targets is called {' or '.join(NAMES)}", tied[0])


def _attention(place: PeftPlace) -> dict[str, PeftEntry]:
    if not {"A", "out_A"} <= set(place.names) or "magnitude" in place.names:
        raise _unsupported("LoRA on an attention with sizes of its own for key and value, or with DoRA", place.path)
    # PEFT (to 0.21.2) adds the change of the output map twice, live and merged: what it trained is twice the file's B.
    twice = PeftEntry("base_layer.out_proj.lora_B.weight", lambda B: B * 2, lambda B: B / 2)
    inner, outer = PeftEntry("lora_B.weight"), PeftEntry("base_layer.out_proj.lora_A.weight")
    return {"A": PeftEntry("lora_A.weight"), "B": inner, "out_A": outer, "out_B": twice}


def _unreadable(why: str) -> SurgeryError:
    return SurgeryError("PEFT's lora_A can't be held exactly", why=why)


def _unsupported(what: str, where: str | None = None) -> SurgeryError:
    return SurgeryError(f"PEFT's format can't hold {what}", where=where, fix=SURGERY)
