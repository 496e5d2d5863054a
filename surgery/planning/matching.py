"""Pattern × model → matches, or reasons. The only matcher: planning and `explain` both ask here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

from torch import fx, nn

from surgery.authoring.declaration import Declaration
from surgery.errors import MatchError, near_misses
from surgery.patterns.module_walk import every_path
from surgery.patterns.paths import endings, literal_alternatives
from surgery.patterns.pattern import Candidate, Pattern, Targets, Verdict, as_pattern
from surgery.patterns.type_names import type_hint

__all__ = ["Match", "matches", "verdict_of"]


@dataclass(frozen=True)
class Match:
    """One module a rule goes to: its first path, and the other paths the same object is reached by."""

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    """The model's modules, each once in the model's order, with all their paths; adapters' own tensors left out."""

    model: nn.Module
    paths: dict[int, list[str]]
    modules: dict[str, nn.Module]
    heads: frozenset[int]
    known: dict[tuple, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)  # `hits`

    @staticmethod
    def of(model: nn.Module) -> Tree:
        paths: dict[int, list[str]] = {}
        modules: dict[str, nn.Module] = {}
        for path, module in every_path(model):
            modules[path] = module
            paths.setdefault(id(module), []).append(path)
        return Tree(model, paths, modules, frozenset(_heads(model)))

    def candidate(self, path: str) -> Candidate:
        parent = self.modules[path.rpartition(".")[0]] if path else None
        return Candidate(path, self.modules[path], self.heads, parent)

    def candidates(self, module: nn.Module) -> Iterator[Candidate]:
        return map(self.candidate, self.paths[id(module)])

    @cached_property
    def endings(self) -> dict[str, list[str]]:
        """Every name that fits some path, with the paths."""
        found: dict[str, list[str]] = {}
        for path in self.modules:
            for ending in endings(path):
                found.setdefault(ending, []).append(path)
        return found

    @cached_property
    def layers(self) -> dict[int | None, set[str]]:
        """The paths in each layer; None: those in none."""
        found: dict[int | None, set[str]] = {}
        for path in self.modules:
            found.setdefault(_layer_of(path), set()).add(path)
        return found

    @cached_property
    def order(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.modules)}

    def hits(self, targets: Targets) -> frozenset[str]:
        """The paths that one of these targets fits. Rules that share targets ask once."""
        listed = _listed(targets)
        try:
            found = self.known.get(listed)
        except TypeError:  # a pattern with a condition that can't be hashed
            return self._hits(listed)
        if found is None:
            found = self.known[listed] = self._hits(listed)
        return found

    def _hits(self, listed: tuple) -> frozenset[str]:
        if not all(isinstance(target, str) and target != "all-linear" for target in listed):
            patterns = list(map(as_pattern, listed))
            return frozenset(
                path for path in self.modules if any(one.verdict(self.candidate(path)) for one in patterns)
            )
        found: set[str] = set()
        for target in listed:
            if target.startswith("re:") and (listed_paths := literal_alternatives(target[3:])) is not None:
                found.update([path for path in listed_paths if path and path in self.modules])
            elif target.startswith("re:"):
                fits = re.compile(target[3:]).fullmatch
                found.update([path for path in self.modules if path and fits(path)])
            else:
                found.update(self.endings.get(target, ()))
        return frozenset(found)

    def distinct(self) -> Iterator[nn.Module]:
        for paths in self.paths.values():
            yield self.modules[paths[0]]


def matches(tree: Tree, rule: Declaration) -> list[Match]:
    """The modules a rule goes to, in the model's order, each once.

    Raises `MatchError` where nothing matches, or where `expect` says another number than was found.
    """
    hits = tree.hits(rule.targets)
    if rule.layers is not None:
        inside = [tree.layers.get(layer, frozenset()) for layer in cast("tuple[int, ...]", rule.layers)]
        hits = hits.intersection(frozenset().union(*inside))
    if rule.exclude:
        hits = hits.difference(tree.hits(rule.exclude))
    chosen: dict[int, str] = {}
    for hit in sorted(hits, key=tree.order.__getitem__):
        chosen.setdefault(id(tree.modules[hit]), hit)
    found = [
        Match(hit, tree.modules[hit], tuple([path for path in tree.paths[key] if path != hit]))
        for key, hit in sorted(chosen.items(), key=lambda item: tree.order[tree.paths[item[0]][0]])
    ]
    if not found and rule.expect != 0:
        raise _nothing(tree, rule)
    if rule.expect is not None and len(found) != rule.expect:
        listed = ", ".join(match.path for match in found[:6]) + (", …" if len(found) > 6 else "")
        raise MatchError(
            f"{rule.label} expects {rule.expect} sites and matches {len(found)}",
            where=listed,
            why=f"targets {_shown(_listed(rule.targets))} were written for another model, or match more than was meant",
            fix="correct targets, exclude or layers, or the number in expect",
        )
    return found


def idle_targets(tree: Tree, rule: Declaration) -> list[str]:
    """The entries of a rule's targets and exclude that fit no module at all, each with near misses."""
    listed = {name: _listed(getattr(rule, name)) for name in ("targets", "exclude")}
    told = []
    for name, target in ((name, target) for name, targets in listed.items() for target in targets):
        if not _fits_any(tree, target):
            near = type_hint(target, tree.distinct()) or _near_names(tree, target)
            told.append(
                f"{rule.label}: {name} has {target!r}, which no module of the model fits"
                + (f"; {near}" if near else "")
            )
    return told


def verdict_of(tree: Tree, rule: Declaration, path: str) -> Verdict:
    """Why a rule does or does not match at a path; `MatchError` with near misses where the model has no such path."""
    if path not in tree.modules:
        raise MatchError(
            f"the model has no module {path!r}", why=near_misses(path, tree.modules), fix="see model.named_modules()"
        )
    return _verdict(tree.candidate(path), rule)


def _fits_any(tree: Tree, target: str | Pattern) -> bool:
    if isinstance(target, str) and target != "all-linear" and not target.startswith("re:"):
        return target in tree.endings
    return bool(tree.hits((target,)))


def _verdict(candidate: Candidate, rule: Declaration) -> Verdict:
    targets, exclude = (tuple(map(as_pattern, _listed(listed))) for listed in (rule.targets, rule.exclude))
    parts = [_any_of("targets", candidate, targets)]
    if parts[0] or not rule.targets:
        if rule.exclude:
            out = _any_of("exclude", candidate, exclude)
            parts.append(Verdict(not out, "exclude", f"excluded: {out.reason}" if out else "not excluded", out.parts))
        if rule.layers is not None:
            parts.append(_layer(candidate.path, cast(tuple, rule.layers)))
    failed = [part.clause for part in parts if not part]
    reason = "fails at " + ", ".join(failed) if failed else "matches"
    return Verdict(not failed, f"{rule.label} at {candidate.path or '(the model itself)'}", reason, tuple(parts))


def _any_of(label: str, candidate: Candidate, targets: tuple[Pattern, ...]) -> Verdict:
    found = [target.verdict(candidate) for target in targets]
    holds = [part.clause for part in found if part]
    return Verdict(bool(holds), label, ", ".join(holds) or "no target matches", tuple(found))


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _layer(path: str, layers: tuple[int, ...]) -> Verdict:
    # PEFT's layers_to_transform: the first number in the path is the layer's index.
    index = _layer_of(path)
    shown = "no layer index in its path" if index is None else f"it is in layer {index}"
    return Verdict(index in layers, f"layers {list(layers)}", shown)


def _nothing(tree: Tree, rule: Declaration) -> MatchError:
    if not rule.targets:
        return MatchError(
            f"{rule.label} has no targets", why="targets is empty", fix='name modules, types, or "all-linear"'
        )
    tried = [as_pattern(target) for target in _listed(rule.targets)]
    by_target = [
        module.path
        for module in (next(tree.candidates(m)) for m in tree.distinct())
        if any(pattern.verdict(module) for pattern in tried)
    ]
    if by_target:
        why = f"its targets match {len(by_target)} modules ({by_target[0]}, …) and exclude or layers leave none of them"
    elif rule.targets == ("all-linear",):
        why = "the model has no linear layer beside its output head"
        if isinstance(tree.model, fx.GraphModule):
            why += "; those of a graph of torch.export are made anew by with_layers(model)"
    else:
        misses = [type_hint(t, tree.distinct()) or _near_names(tree, t) for t in _listed(rule.targets)]
        words = [t for t in _listed(rule.targets) if isinstance(t, str)]
        if any(set(word) & set("*+?()[]|\\^$") and not word.startswith("re:") for word in words):
            misses = ["a regular expression begins with 're:'"]
        leaves = sorted({path.rpartition(".")[2] for path in tree.modules if path})
        listed = [name for name in leaves if not name.isdigit()][:20]
        why = " ".join(filter(None, misses)) or f"no module fits; its modules are called {', '.join(listed)}"
    return MatchError(
        f"{rule.label} matches nothing: targets {_shown(_listed(rule.targets))}",
        why=why,
        fix="correct the targets; explain(model, rule, path) says why a module does not match",
    )


def _near_names(tree: Tree, target: str | Pattern) -> str | None:
    if not isinstance(target, str) or target.startswith("re:"):
        return None
    names = {part for path in tree.modules for part in (path, path.rpartition(".")[2]) if part} | {"all-linear"}
    return near_misses(target, names)


def _listed(targets: Targets) -> tuple:
    return cast(tuple, targets)  # a rule keeps its targets normalised


def _shown(targets: tuple) -> str:
    return "[" + ", ".join(repr(t) if isinstance(t, str) else str(t) for t in targets) + "]"


def _heads(model: nn.Module) -> Iterator[int]:
    """The output heads that `"all-linear"` leaves out: the output embeddings, else a classifier by name."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        head = None
    if isinstance(head, nn.Module):
        yield id(head)
    elif re.search("Classification|QuestionAnswering", type(model).__name__):
        for name in ("score", "classifier", "qa_outputs"):
            found = getattr(model, name, None)
            if isinstance(found, nn.Module):
                yield from (id(module) for module in found.modules())
