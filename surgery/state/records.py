"""What surgery leaves on a model: adapter tensors as parameters, and small records on the root and on each site.

Tensors live under `<site>.adapters.<adapter>.<name>`, so optimisers, `.to()`, state dicts and FSDP see them under a
name that says where they belong. The records are plain data in the modules' `__dict__`: they follow deepcopy and
pickle, and nothing is kept in a table beside the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError
from surgery.forward.tape import Layer
from surgery.patterns.module_walk import base_modules
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.site_links import Links
from surgery.state.tied_weights import Untied

__all__ = ["ModelState", "SiteState", "Standing"]


@dataclass
class Standing:
    """What holds for an adapter as a whole. Its rules share it, so that a switch is written down in one place.

    `live`: its edits are in the forwards, what they change times `weight`. `in_base`: one of its rules changed the
    base's own parameters at the start. `freezes`: the base is frozen for as long as the adapter is there.
    """

    live: bool = True
    weight: float = 1.0
    in_base: bool = False
    freezes: bool = True


@dataclass
class Applied:
    """One rule at one site. `changed` holds what its initialisation did to the base's own parameters.

    `layer` holds its edits, which are recorded anew where it is None: in copies and after unpickling. `tensors` are the
    names of those it asked for, `trained` of those to be trained. `inside`: it edits what is inside the forward, anew
    for each kind of call. `facts` is what the rule found out about the module (`Site.fact`).
    """

    adapter: str
    rule: Rule
    standing: Standing
    changed: list[Any] = field(default_factory=list)
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
        """Whether what it changes can be multiplied. Functions around others can't."""
        around = self.layer is not None and any(step.kind == "around" for step in self.layer.tape.steps)
        return self.rule.scalable and not around

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layer": None}


@dataclass
class Merged:
    """What a merge left on a site: the adapters it folded, how to take each fold out, and parameters untied for it."""

    adapters: tuple[str, ...]
    folds: list[Any] = field(default_factory=list)
    tied: dict[str, Any] = field(default_factory=dict)


@dataclass
class SiteState:
    """A site's record: its path in the model, its own class, and the rules on it in the order they came.

    `variants`: where rules look into the forward, its forms for the kinds of calls met so far; `classes`: those made so
    far, by which adapters are live with which weights; `woven`: the class it was given last, with its edits, where they
    are known (`surgery.weaving.site_class`); `layouts`: what is known of the rows of a batch in the module's input, by
    its number of dimensions (`surgery.routing.batch_layout`). Copies make their own.
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
        """The rules of these adapters, with their places. One adapter's stand together, and most often last: many
        others are not looked at."""
        if len(adapters) != 1:
            return [(index, one) for index, one in enumerate(self.applied) if one.adapter in adapters]
        found: list[tuple[int, Applied]] = []
        for index in range(len(self.applied) - 1, -1, -1):
            if self.applied[index].adapter in adapters:
                found.append((index, self.applied[index]))
            elif found:
                break
        return found[::-1]

    def take_out(self, adapters: Collection[str]) -> list[tuple[int, Applied]]:
        found = self.of(adapters)
        for index, _ in reversed(found):
            del self.applied[index]
        return found

    def put_back(self, found: list[tuple[int, Applied]]) -> None:
        for index, applied in found:
            self.applied.insert(index, applied)

    def live(self) -> list[Applied]:
        """The rules whose edits are to be in the forward."""
        merged = self.merged.adapters if self.merged is not None else ()
        return [applied for applied in self.applied if applied.standing.live and applied.adapter not in merged]


@dataclass
class Places:
    """Where an adapter is: its sites, its rules at each, and what holds its tensors at those where it has any.

    Lists of their own, since a switch goes through all sites, and it is far from a module to its adapter's tensors.
    """

    modules: list[nn.Module] = field(default_factory=list)
    rules: list[list[Applied]] = field(default_factory=list)
    boxes: list[AdapterTensors] = field(default_factory=list)

    @staticmethod
    def of(adapter: str, rules: Iterable[tuple[nn.Module, list[Applied]]]) -> Places:
        found = Places()
        for module, here in rules:
            found.modules.append(module)
            found.rules.append(here)
            if (box := box_of(module, adapter)) is not None:
                found.boxes.append(box)
        return found

    def __iter__(self) -> Iterator[tuple[nn.Module, list[Applied]]]:
        return zip(self.modules, self.rules, strict=True)


_records: WeakValueDictionary[int, ModelState] = WeakValueDictionary()


def is_only_record() -> bool:
    """Whether no more than one model of this process has a record, so that no part of that one has another."""
    return len(_records) <= 1


# Writes adapters of a model into a folder, by the arguments of `save_pretrained`. It is a function of a module, so that
# a model's copies and pickles keep it.
AdapterWriter = Callable[[nn.Module, Path, list[str], Mapping[str, Any]], None]


@dataclass
class ModelState:
    """A model's record: the rules of each adapter, and what has to be put back when the last one goes.

    `places`: the sites of each adapter; `keys`: the sets of live adapters met so far, one object for those that are
    equal, so that sites compare no more than that; `links`: how the sites hang in the model (None: unknown), and
    `unlinked`: those that came since; `untied`: what a model of transformers said of its ties before a merge.
    """

    adapters: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)  # requires_grad of the base's parameters before it was frozen
    ignored_on_save: list[tuple[str, Any]] = field(default_factory=list)
    switched: list[tuple[str, str, Any, Any]] = field(default_factory=list)  # (module, attribute, before, while live)
    places: dict[str, Places] = field(default_factory=dict)
    standing: dict[str, Standing] = field(default_factory=dict)
    adapter_writer: AdapterWriter | None = None  # what `save_pretrained` calls in the place of transformers' own
    moving: list[nn.Module] = field(default_factory=list)  # those whose running statistics the base gets back
    resting: dict[str, float] = field(default_factory=dict)  # what was live before `deactivate`, until `activate`
    keys: dict[frozenset, frozenset] = field(default_factory=dict, compare=False, repr=False)
    links: Links | None = field(default=None, compare=False, repr=False)
    unlinked: list[nn.Module] = field(default_factory=list, compare=False, repr=False)
    untied: Untied = field(default_factory=Untied)

    def __new__(cls, *_: Any, **__: Any) -> ModelState:  # copying and unpickling come here, too
        made = super().__new__(cls)
        _records[id(made)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keys": {}, "links": None, "unlinked": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"links": None, "unlinked": [], "moving": [], "untied": Untied(), **state})

    def place(self, adapter: str, places: Places) -> None:
        """Write down where an adapter is."""
        self.places[adapter] = places
        self.unlinked += places.modules

    def sites(self) -> list[nn.Module]:
        """The modules that any adapter is on, as written down; each once."""
        return list(dict.fromkeys(itertools.chain.from_iterable([places.modules for places in self.places.values()])))

    def rules_at(self, adapters: Collection[str]) -> dict[int, list[Applied]]:
        """These adapters' rules at each of their sites, by its id, in the order they were applied; others are not
        looked at."""
        found: dict[int, list[Applied]] = {}
        for name in [name for name in self.adapters if name in adapters]:
            for module, rules in self.places[name]:
                found.setdefault(id(module), []).extend(rules)
        return found

    @property
    def freezing(self) -> list[str]:
        """The adapters that freeze the base."""
        return [name for name, standing in self.standing.items() if standing.freezes]

    @property
    def idle(self) -> list[str]:
        """The adapters that are not live."""
        return [name for name, standing in self.standing.items() if not standing.live]

    def forget(self, adapter: str) -> None:
        """Nothing is said of an adapter any more."""
        for named in (self.adapters, self.places, self.standing, self.resting):
            named.pop(adapter, None)


_MODEL, _SITE = "_surgery_model", "_surgery_site"


def model_state(model: nn.Module) -> ModelState | None:
    return model.__dict__.get(_MODEL)


def site_state(module: nn.Module) -> SiteState | None:
    return module.__dict__.get(_SITE)


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, SiteState]]:
    """The rewritten modules of a model with their present paths, each once.

    A part of it that was rewritten by itself has sites of its own, which are none of these.
    """
    for path, module in base_modules(model, stop=_MODEL):
        state = site_state(module)
        if state is not None:
            yield path, module, state


Sites = Sequence[tuple[str, nn.Module, SiteState]]  # what `sites` gives


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters under every name that a module has for them, wrappers' segments left out."""
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def merged_adapters(model: nn.Module) -> list[str]:
    """The adapters that the base's weights hold."""
    return list({name: None for _, _, site in sites(model) if site.merged for name in site.merged.adapters})


def require_state(model: nn.Module) -> ModelState:
    """The record of this very module, which has one."""
    state = model_state(model)
    if state is None:
        raise SurgeryError("no rules were applied to this module", fix="apply rules first")
    if model.__dict__.get("_hf_peft_config_loaded"):  # said by transformers' load_adapter and add_adapter
        raise SurgeryError(
            "PEFT's adapters came onto this model after its own",
            why="model.load_adapter and model.add_adapter of transformers put PEFT's layers around its sites",
            fix="load the model anew, and PEFT's checkpoints by surgery.load_adapter(model, folder)",
        )
    return state
