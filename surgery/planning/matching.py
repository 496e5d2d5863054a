"""Matches a rule's targets against the modules of a model. Planning and `explain` both use this matcher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import fx, nn

from surgery.authoring.declaration import Declaration
from surgery.errors import MatchError, near_misses
from surgery.patterns.module_walk import every_path
from surgery.patterns.paths import endings, literal_alternatives
from surgery.patterns.pattern import Candidate, Pattern, Verdict
from surgery.patterns.targets import Targets, as_pattern
from surgery.patterns.type_names import type_hint

__all__ = ["Match", "matches", "verdict_of"]


@dataclass(frozen=True)
class Match:
    """One module that a rule matches: its first matching path, the module's other paths, and facts for its site."""

    path: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tree:
    """The model's modules in the model's order, each once, with all their paths; without adapter containers."""

    model: nn.Module
    paths: dict[int, list[str]]
    modules: dict[str, nn.Module]
    heads: frozenset[int]
    cached_hits: dict[tuple, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)

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
        """Each ending of a path at a dot, with the paths that end with it."""
        paths_by_ending: dict[str, list[str]] = {}
        for path in self.modules:
            for ending in endings(path):
                paths_by_ending.setdefault(ending, []).append(path)
        return paths_by_ending

    @cached_property
    def layers(self) -> dict[int | None, set[str]]:
        """The paths by layer index; None: paths without one."""
        paths_by_layer: dict[int | None, set[str]] = {}
        for path in self.modules:
            paths_by_layer.setdefault(_layer_of(path), set()).add(path)
        return paths_by_layer

    @cached_property
    def order(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.modules)}

    def hits(self, targets: Targets) -> frozenset[str]:
        """The paths that match one of these targets, cached for rules with the same targets."""
        listed = _listed(targets)
        try:
            paths = self.cached_hits.get(listed)
        except TypeError:  # a pattern with a condition that can't be hashed
            return self._hits(listed)
        if paths is None:
            paths = self.cached_hits[listed] = self._hits(listed)
        return paths

    def _hits(self, listed: tuple) -> frozenset[str]:
        """As `hits`, without the cache."""
        if not all(isinstance(target, str) and target != "all-linear" for target in listed):
            patterns = list(map(as_pattern, listed))
            return frozenset(
                path for path in self.modules if any(pattern.verdict(self.candidate(path)) for pattern in patterns)
            )
        paths: set[str] = set()
        for target in listed:
            if target.startswith("re:") and (listed_paths := literal_alternatives(target[3:])) is not None:
                paths.update([path for path in listed_paths if path and path in self.modules])
            elif target.startswith("re:"):
                fits = re.compile(target[3:]).fullmatch
                paths.update([path for path in self.modules if path and fits(path)])
            else:
                paths.update(self.endings.get(target, ()))
        return frozenset(paths)

    def distinct(self) -> Iterator[nn.Module]:
        for paths in self.paths.values():
            yield self.modules[paths[0]]


def matches(tree: Tree, rule: Declaration) -> list[Match]:
    """The modules that a rule matches, in the model's order, each once.

    Raises `MatchError` if nothing matches, or if the number differs from the rule's `expect`.
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
    matched = [
        Match(hit, tree.modules[hit], tuple([path for path in tree.paths[key] if path != hit]))
        for key, hit in sorted(chosen.items(), key=lambda item: tree.order[tree.paths[item[0]][0]])
    ]
    if not matched and rule.expect != 0:
        raise _nothing(tree, rule)
    if rule.expect is not None and len(matched) != rule.expect:
        listed = ", ".join(match.path for match in matched[:6]) + (", …" if len(matched) > 6 else "")
        raise MatchError(
            f"{rule.label} expects {rule.expect} sites and matches {len(matched)}",
            where=listed,
            why=f"targets {_quoted(_listed(rule.targets))} are for another model, or match more modules than intended",
            fix="correct targets, exclude or layers, or the number in expect",
        )
    return matched


def unmatched_targets(tree: Tree, rule: Declaration) -> list[str]:
    """A warning for each entry of a rule's targets and exclude that matches no module, with similar names."""
    listed = {name: _listed(getattr(rule, name)) for name in ("targets", "exclude")}
    warnings = []
    for name, target in ((name, target) for name, targets in listed.items() for target in targets):
        if not _fits_any(tree, target):
            near = type_hint(target, tree.distinct()) or _near_names(tree, target)
            warnings.append(
                f"{rule.label}: {name} has {target!r}, which matches no module of the model"
                + (f"; {near}" if near else "")
            )
    return warnings


def verdict_of(tree: Tree, rule: Declaration, path: str) -> Verdict:
    """Why a rule matches the module at a path or not; `MatchError` with similar paths if there is no such module."""
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
    verdicts = [target.verdict(candidate) for target in targets]
    holds = [part.clause for part in verdicts if part]
    return Verdict(bool(holds), label, ", ".join(holds) or "no target matches", tuple(verdicts))


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _layer(path: str, layers: tuple[int, ...]) -> Verdict:
    # PEFT's layers_to_transform: the first number in the path is the layer's index.
    index = _layer_of(path)
    reason = "no layer index in its path" if index is None else f"it is in layer {index}"
    return Verdict(index in layers, f"layers {list(layers)}", reason)


def _nothing(tree: Tree, rule: Declaration) -> MatchError:
    """The error for a rule without a match; `why` has the likeliest reason."""
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
        why = f"its targets match {len(by_target)} modules ({by_target[0]}, …), and exclude or layers drop all of them"
    elif rule.targets == ("all-linear",):
        why = "the model has no linear layer beside its output head"
        if isinstance(tree.model, fx.GraphModule):
            why += "; with_layers(model) restores the layers of a graph of torch.export"
    else:
        misses = [type_hint(t, tree.distinct()) or _near_names(tree, t) for t in _listed(rule.targets)]
        words = [t for t in _listed(rule.targets) if isinstance(t, str)]
        if any(set(word) & set("*+?()[]|\\^$") and not word.startswith("re:") for word in words):
            misses = ["a regular expression begins with 're:'"]
        leaves = sorted({path.rpartition(".")[2] for path in tree.modules if path})
        listed = [name for name in leaves if not name.isdigit()][:20]
        why = " ".join(filter(None, misses)) or f"no module matches; the modules are called {', '.join(listed)}"
    return MatchError(
        f"{rule.label} matches nothing: targets {_quoted(_listed(rule.targets))}",
        why=why,
        fix="correct the targets; explain(model, rule, path) says why a module does not match",
    )


def _near_names(tree: Tree, target: str | Pattern) -> str | None:
    if not isinstance(target, str) or target.startswith("re:"):
        return None
    names = {part for path in tree.modules for part in (path, path.rpartition(".")[2]) if part} | {"all-linear"}
    return near_misses(target, names)


def _listed(targets: Targets) -> tuple:
    return cast(tuple, targets)  # a rule normalises its targets to a tuple


def _quoted(targets: tuple) -> str:
    return "[" + ", ".join(repr(t) if isinstance(t, str) else str(t) for t in targets) + "]"


def _heads(model: nn.Module) -> Iterator[int]:
    """The output heads that `"all-linear"` skips: the output embeddings, or a classifier with a usual name."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        head = None
    if isinstance(head, nn.Module):
        yield id(head)
    elif re.search("Classification|QuestionAnswering", type(model).__name__):
        for name in ("score", "classifier", "qa_outputs"):
            classifier = getattr(model, name, None)
            if isinstance(classifier, nn.Module):
                yield from (id(module) for module in classifier.modules())
