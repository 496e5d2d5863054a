"""PEFT's trainable_token_indices: which modules' rows are trained, and which of them share their rows.

Rows of the base's own embeddings that stand in a file are a part beside it (`base_rows.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPart, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules.peft.base_rows import base_key, base_rows
from surgery.rules.peft.tied_modules import embedding_path, named_embeddings, paths_with_weight, tied_paths
from surgery.rules.tokens import BaseRowsRule, TokensRule

PREFIX = "base_model.model."
Groups = dict[tuple[str, ...], list[int]]  # the paths that share their rows → the rows


@peft_method
class BaseRows(PeftPart):
    """Read from the base's embeddings in a file, and written into them."""

    rule, derived = BaseRowsRule, ("base_index",)

    def base(self, config: PeftConfig) -> Iterable[Rule]:
        return base_rows(config)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        assert isinstance(place.rule, BaseRowsRule)
        return {"base_rows": _of_base(place, place.rule)}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        return {}


@peft_method
class TrainableTokens(PeftMethod):
    """PEFT's method of rows alone. Its tensors are entries of `Tokens`, the part of rows beside any method."""

    peft_type, rule, targeted = "TRAINABLE_TOKENS", TokensRule, False
    lacks = ("ensure_weight_tying", "layer_replication")

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent("init_weights")
        ids = config.take("token_indices", [])
        embedding = embedding_path(config.modules)
        paths = sorted(config.targeted) if config.take("target_modules") else [embedding or "embed_tokens"]
        if not paths:
            raise config.refuse("target_modules", "it names no module of the model")
        for group, rows in _groups({path: ids for path in paths}, config.modules, False).items():
            config.passed_over += _repeated(config, group)
            yield TokensRule(targets=config.regular(group), tokens=list(rows))

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        random = config.data.get("init_weights") is False
        return [rule.replace(init="random") if random else rule for rule in self.read(config)]

    def complete(
        self, config: dict[str, Any], tensors: dict[str, Tensor], modules: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        indices = config.pop("trainable_token_indices")
        first, *more = indices.values()
        if any(ids != first for ids in more):
            why = "it trains the same rows of each module"
            raise SurgeryError("PEFT's format can't hold these TokensRules", where=" and ".join(indices), why=why)
        ends = {path: [other for other in modules.by_path if f".{other}".endswith(f".{path}")] for path in indices}
        plain = all(others == [path] for path, others in ends.items())
        targets: Any = list(indices) if plain else "|".join(map(re.escape, indices))
        return {**config, "token_indices": list(first), "target_modules": targets, "init_weights": True}, tensors


@peft_method
class Tokens(PeftPart):
    rule, derived, layer, alone = TokensRule, ("index",), "TrainableTokensLayer", "TRAINABLE_TOKENS"

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        indices = config.take("trainable_token_indices")
        if not indices:
            return
        tying = bool(config.data.get("ensure_weight_tying")) and not named_embeddings(config)
        if tying:  # else no rule holds it
            config.take("ensure_weight_tying")
        for paths, ids in _groups(indices, config.modules, tying).items():
            config.passed_over += _repeated(config, paths)
            yield TokensRule(targets=config.regular(paths), tokens=list(ids))

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        assert isinstance(place.rule, TokensRule)
        indices, embedding = place.config.get("trainable_token_indices"), embedding_path(place.modules)
        together = _sharing(place.modules.matched(place.rule), place)
        path = embedding if embedding in together else place.path
        ids: Any = indices
        if isinstance(indices, dict):
            ids = next((ids for name, ids in indices.items() if str(path).endswith(name)), None)
        ids = ids or place.config.get("token_indices")
        order = torch.tensor(ids or list(place.rule.tokens)).argsort()
        key = f"/{_key(str(path), place.config)}"
        return {"rows": PeftEntry(key, lambda rows: rows[order], lambda rows: rows[order.argsort()])}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        embedding, wanted = embedding_path(modules), Groups()
        for rule, paths in placed:
            assert isinstance(rule, TokensRule)
            for path in paths:
                alike = [p for p in paths if modules.by_path[p].weight is modules.by_path[path].weight]
                wanted[tuple(sorted(alike, key=lambda p: (p != embedding, p)))] = list(
                    rule.tokens
                )  # in the user's order, as PEFT's rows are
        indices = {paths[0]: ids for paths, ids in wanted.items()}
        read_back = {tuple(sorted(paths)): ids for paths, ids in _groups(indices, modules, False).items()}
        if read_back != {tuple(sorted(paths)): ids for paths, ids in wanted.items()}:
            paths = next((paths for paths in wanted if tuple(sorted(paths)) not in read_back), next(iter(wanted)))
            why = "PEFT would train the rows of other modules, or others together: of tied ones it has one copy"
            raise SurgeryError("PEFT's format can't hold these TokensRules", where=" and ".join(paths), why=why)
        return {"trainable_token_indices": indices}


def _of_base(place: PeftPlace, rule: BaseRowsRule) -> PeftEntry:
    """Rows of the base: some of the whole matrix that the file has of the module, or of one that is tied to it."""
    index, paths = torch.tensor(sorted(rule.tokens)), paths_with_weight(place.modules.by_path, place.module)
    keys = [key for key in place.file_keys if (hit := base_key(key, place.modules.by_path)) and hit[0] in paths]
    path = next((path for path in paths if path in place.main), paths[0])
    indices = place.config.get("trainable_token_indices")
    tokens = indices and any(path in group for group in _groups(indices, place.modules, False))
    inside = ("token_adapter.base_layer." if tokens else "") + ("base_layer." if path in place.main else "")
    key = keys[0] if keys else f"{PREFIX}{path}.{inside}weight"

    def write(rows: Tensor) -> Tensor:
        whole = place.base("weight")
        return whole.index_copy(0, index.to(whole.device), rows.to(whole))

    return PeftEntry(f"/{key}", lambda matrix: matrix[index], write)


def _repeated(config: PeftConfig, paths: Sequence[str]) -> Iterable[str]:
    """Keys of rows that PEFT writes once more of a tied head, beside those of the embedding that it reads."""
    first, *others = (_key(path, config.data) for path in paths)
    file = config.file
    if file is not None and first in file.shapes:
        yield from (key for key in others if key in file.shapes and torch.equal(file.read(key), file.read(first)))


def _key(path: str, config: Mapping[str, Any]) -> str:
    """The key of a module's rows: of the method of rows alone, or beside another method."""
    inside = "" if config.get("peft_type") == TrainableTokens.peft_type else "token_adapter."
    return f"{PREFIX}{path}.{inside}trainable_tokens_delta"


def _groups(indices: Any, modules: Any, tying: bool) -> Groups:
    """Which modules have which rows trained, and which of them together, as PEFT reads its configuration.

    A head that is tied to the embedding shares the embedding's rows, where these are trained and no others are given
    for it. `tying`: PEFT's ensure_weight_tying.
    """
    embedding = embedding_path(modules)
    if isinstance(indices, list):
        indices = {embedding or "embed_tokens": indices}
    tied, names = _tied(modules), list(indices)
    if embedding is not None and tied and len(names) > 1:
        same = [name for name in names if embedding.endswith(name) or any(_means(name, path) for path in tied)]
        differ = any(indices[name] != indices[same[0]] for name in same[1:])
        if differ and tying:
            what = "Cannot ensure weight tying when different token indices are specified"
            fix = "give the tied modules the same tokens, or leave ensure_weight_tying out"
            raise SurgeryError(what, where=", ".join(same), fix=fix)
        if not differ and len(same) > 1:
            indices = {name: ids for name, ids in indices.items() if name not in tied}
        tied = [] if differ else tied
    groups, used = Groups(), set[str]()
    for name, ids in indices.items():
        paths = [path for path in modules.by_path if path.endswith(name) and path not in used]
        if not paths:
            raise SurgeryError(
                f"Target modules {{{name!r}}} not found in the base model.", why="its tokens are to be trained"
            )
        used.update(paths)
        for path in paths:
            groups[(path,)] = ids
    if embedding is not None and (embedding,) in groups and tied:
        ids = groups.pop((embedding,))
        groups[(embedding, *(path for path in tied if path not in used))] = ids
    return groups


def _means(name: str, path: str) -> bool:
    return path.endswith(name) or name in path.split(".")


def _tied(modules: Any) -> list[str]:
    """The modules that PEFT ties for rows of tokens: the model's configuration has to say so."""
    tied = getattr(getattr(modules.model, "config", None), "tie_word_embeddings", False)
    return tied_paths(modules) if tied else []


def _sharing(paths: Iterable[str], place: PeftPlace) -> set[str]:
    """Of these paths, the ones that hold the weight of a rule's site."""
    return set(paths) & set(paths_with_weight(place.modules.by_path, place.module))
