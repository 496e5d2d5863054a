"""The records on a rewritten model: one on the model, one on each site.

Adapter tensors are parameters named `<site>.adapters.<adapter>.<name>`, so optimisers, `.to()`, state dicts and FSDP
see them under a name that shows their place. Records are plain data in the modules' `__dict__`, so deepcopy and pickle
carry them. Nothing is stored outside the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from surgery.arithmetic.corrections import Record
from surgery.authoring.rule import Rule
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SurgeryError
from surgery.forward.tape import Layer
from surgery.patterns.module_walk import base_modules
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.kept_codes import KeptCodes
from surgery.state.packed_module import PackedFold
from surgery.state.restructuring import Restructuring
from surgery.state.site_links import Links
from surgery.state.tied_weights import Untied

__all__ = ["ModelState", "SiteState", "Standing"]


@dataclass
class Standing:
    """The status of one adapter, shared by all its records, so activating it is one write.

    `live`: its edits are in the forwards, scaled by `weight`. `in_base`: a rule changed the base's own parameters at
    initialisation. `freezes`: the base is frozen while the adapter is on the model.
    """

    live: bool = True
    weight: float = 1.0
    in_base: bool = False
    freezes: bool = True


@dataclass
class Applied:
    """One rule at one site.

    `changed`: the changes of the base's parameters by its initialisation. `layer`: its edits; None in copies and after
    unpickling, where they are recorded again. `tensors`: the names of its tensors; `trained`: of those that train.
    `inside`: it edits values inside the forward, for each kind of call. `facts`: its facts (`Site.fact`).
    """

    adapter: str
    rule: Rule
    standing: Standing
    changed: list[tuple[str, Record | KeptCodes]] = field(default_factory=list)
    tensors: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    inside: bool = False
    layer: Layer | None = field(default=None, compare=False, repr=False)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.standing.live

    @property
    def weight(self) -> float:
        return self.standing.weight

    @property
    def scalable(self) -> bool:
        """Whether its change can be multiplied by a weight. A function around another function can't."""
        around = self.layer is not None and any(step.kind == "around" for step in self.layer.tape.steps)
        return self.rule.scalable and not around

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layer": None}


@dataclass
class Merged:
    """The record of a merge at a site: the folded adapters, the folds with their inverses, and untied parameters.

    `packed`: the merge into a quantised weight.
    """

    adapters: tuple[str, ...]
    folds: list[tuple[str, Record]] = field(default_factory=list)
    tied: dict[str, nn.Parameter] = field(default_factory=dict)
    packed: PackedFold | None = None

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors that the merge changed."""
        return [name for name, _ in self.folds] + (self.packed.names if self.packed is not None else [])


@dataclass
class SiteState:
    """A site's record: its path in the model, its own class, and its rules in the order of application.

    The other fields are caches, empty in copies. `variants`: generated forwards by kind of call, for rules that look
    into the forward. `classes`: generated classes by live adapters and weights. `woven`: the last generated class with
    its edits, if known (`surgery.weaving.site_class`). `layouts`: the batch dimension of the module's input by its
    number of dimensions (`surgery.routing.batch_layout`).
    """

    path: str
    base: type[nn.Module]
    applied: list[Applied] = field(default_factory=list)
    merged: Merged | None = None
    variants: list[Any] = field(default_factory=list, compare=False, repr=False)
    classes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    woven: Any = field(default=None, compare=False, repr=False)
    layouts: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "variants": [], "classes": {}, "woven": None, "layouts": {}}

    def of(self, adapters: Collection[str]) -> list[tuple[int, Applied]]:
        """Returns the rules of these adapters with their positions.

        The rules of one adapter are adjacent and usually last, so a single adapter is searched from the end.
        """
        if len(adapters) != 1:
            return [(index, applied) for index, applied in enumerate(self.applied) if applied.adapter in adapters]
        matches: list[tuple[int, Applied]] = []
        for index in range(len(self.applied) - 1, -1, -1):
            if self.applied[index].adapter in adapters:
                matches.append((index, self.applied[index]))
            elif matches:
                break
        return matches[::-1]

    def take_out(self, adapters: Collection[str]) -> list[tuple[int, Applied]]:
        """Remove the rules of these adapters. Returns them for `put_back`."""
        removed = self.of(adapters)
        for index, _ in reversed(removed):
            del self.applied[index]
        return removed

    def put_back(self, removed: list[tuple[int, Applied]]) -> None:
        """Insert the rules that `take_out` removed at their old positions."""
        for index, applied in removed:
            self.applied.insert(index, applied)

    def live(self) -> list[Applied]:
        """Returns the rules whose edits belong into the forward."""
        merged = self.merged.adapters if self.merged is not None else ()
        return [applied for applied in self.applied if applied.standing.live and applied.adapter not in merged]


@dataclass
class Places:
    """The places of an adapter: its sites, its rules at each, and the modules with its tensors.

    Separate lists, because a switch visits all sites, and a lookup from a module to its adapter's tensors is slow.
    """

    modules: list[nn.Module] = field(default_factory=list)
    rules: list[list[Applied]] = field(default_factory=list)
    boxes: list[AdapterTensors] = field(default_factory=list)

    @staticmethod
    def of(adapter: str, rules: Iterable[tuple[nn.Module, list[Applied]]]) -> Places:
        places = Places()
        for module, applied in rules:
            places.modules.append(module)
            places.rules.append(applied)
            if (box := box_of(module, adapter)) is not None:
                places.boxes.append(box)
        return places

    def __iter__(self) -> Iterator[tuple[nn.Module, list[Applied]]]:
        return zip(self.modules, self.rules, strict=True)


_records: WeakValueDictionary[int, ModelState] = WeakValueDictionary()


def is_only_record() -> bool:
    """Whether at most one model of this process has a record, so that no part of it has another."""
    return len(_records) <= 1


# Writes adapters of a model into a folder, with the arguments of `save_pretrained`. It is a function at the top level
# of a module, so that copies and pickles of a model keep it.
AdapterWriter = Callable[[nn.Module, Path, list[str], Mapping[str, Any]], None]


@dataclass
class ModelState:
    """A model's record: the rules of each adapter, and the state to restore with the last adapter.

    `places`: the sites of each adapter. `keys`: one object for each set of live adapters, so that sites compare
    identities. `links`: the edges from the model to its sites (None: unknown); `unlinked`: sites that were added since.
    `untied`: the ties of a transformers model before a merge. `peft_fields`: fields of PEFT's configuration of a loaded
    adapter that no rule has, such as the task, for the next save. `structure`: the structural rules, in the order of
    application. `moved`: the structure changed while adapters were on the model, so rules may match other modules now.
    `unquantised`: what transformers noted on objects about the quantisation, while a merge has taken it off.
    """

    adapters: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)  # requires_grad of the base's parameters before it was frozen
    ignored_on_save: list[tuple[str, Any]] = field(default_factory=list)
    switched: list[tuple[str, str, Any, Any]] = field(default_factory=list)  # (module, attribute, before, while live)
    places: dict[str, Places] = field(default_factory=dict)
    standing: dict[str, Standing] = field(default_factory=dict)
    adapter_writer: AdapterWriter | None = None  # `save_pretrained` calls it in place of transformers' own
    moving: list[nn.Module] = field(default_factory=list)  # modules whose running statistics are restored
    resting: dict[str, float] = field(default_factory=dict)  # adapter → weight before `deactivate`, until `activate`
    peft_fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[frozenset, frozenset] = field(default_factory=dict, compare=False, repr=False)
    links: Links | None = field(default=None, compare=False, repr=False)
    unlinked: list[nn.Module] = field(default_factory=list, compare=False, repr=False)
    untied: Untied = field(default_factory=Untied)
    structure: list[Restructuring] = field(default_factory=list)
    moved: bool = False
    unquantised: list[tuple[Any, dict[str, Any]]] = field(default_factory=list, compare=False, repr=False)

    def __new__(cls, *_: Any, **__: Any) -> ModelState:  # copying and unpickling come here, too
        record = super().__new__(cls)
        _records[id(record)] = record
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keys": {}, "links": None, "unlinked": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            {
                "links": None,
                "unlinked": [],
                "moving": [],
                "untied": Untied(),
                "peft_fields": {},
                "structure": [],
                "moved": False,
                "unquantised": [],
                **state,
            }
        )

    def place(self, adapter: str, places: Places) -> None:
        """Record the places of an adapter."""
        self.places[adapter] = places
        self.unlinked += places.modules

    def sites(self) -> list[nn.Module]:
        """Returns the modules with an adapter, as recorded, each once."""
        return list(dict.fromkeys(itertools.chain.from_iterable([places.modules for places in self.places.values()])))

    def rules_at(self, adapters: Collection[str]) -> dict[int, list[Applied]]:
        """Returns the rules of these adapters by the id of the site, in the order of application."""
        by_site: dict[int, list[Applied]] = {}
        for name in [name for name in self.adapters if name in adapters]:
            for module, rules in self.places[name]:
                by_site.setdefault(id(module), []).extend(rules)
        return by_site

    @property
    def freezing(self) -> list[str]:
        """The adapters that freeze the base."""
        return [name for name, status in self.standing.items() if status.freezes]

    @property
    def structural(self) -> list[str]:
        """The adapters that have structural rules alone: they are in force as long as they are on the model."""
        if not self.structure:
            return []
        return [name for name, rules in self.adapters.items() if all(isinstance(r, StructureRule) for r in rules)]

    @property
    def idle(self) -> list[str]:
        """The adapters that are not live."""
        return [name for name, status in self.standing.items() if not status.live]

    def forget(self, adapter: str) -> None:
        """Remove an adapter from the record."""
        for named in (self.adapters, self.places, self.standing, self.resting, self.peft_fields):
            named.pop(adapter, None)


_MODEL, _SITE = "_surgery_model", "_surgery_site"


def model_state(model: nn.Module) -> ModelState | None:
    return model.__dict__.get(_MODEL)


def site_state(module: nn.Module) -> SiteState | None:
    return module.__dict__.get(_SITE)


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, SiteState]]:
    """Yields the rewritten modules of a model with their present paths, each once.

    The sites of a part that was rewritten separately are not included.
    """
    for path, module in base_modules(model, stop=_MODEL):
        state = site_state(module)
        if state is not None:
            yield path, module, state


Sites = Sequence[tuple[str, nn.Module, SiteState]]  # the items of `sites`


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the base's own parameters under every name of every module, without wrapper segments."""
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def merged_adapters(model: nn.Module) -> list[str]:
    """Returns the adapters that are merged into the base's weights."""
    return list({name: None for _, _, site in sites(model) if site.merged for name in site.merged.adapters})


def require_state(model: nn.Module) -> ModelState:
    """Returns the record of this module. Raises `SurgeryError` if it does not have one."""
    state = model_state(model)
    if state is None:
        raise SurgeryError("no rules were applied to this module", fix="apply rules first")
    if model.__dict__.get("_hf_peft_config_loaded"):  # set by transformers' load_adapter and add_adapter
        raise SurgeryError(
            "PEFT's adapters were added to this model after its own",
            why="model.load_adapter and model.add_adapter of transformers put PEFT's layers around its sites",
            fix="load the model again, and load PEFT's checkpoints with surgery.load_adapter(model, folder)",
        )
    return state
