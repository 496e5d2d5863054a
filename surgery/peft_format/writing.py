"""Writes adapters as PEFT's configuration and tensors, or says why these would not be the same adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.authoring.equal_rules import ByRule
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import LoadError, SurgeryError
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import RESERVED
from surgery.peft_format.adapter_config import SILENT, STARTS
from surgery.peft_format.base_embeddings import Save, embedding_tensors
from surgery.peft_format.methods import PeftMethod, PeftPlace, absolute, is_main, method_of, part_of, unsupported
from surgery.peft_format.targets import Modules, chosen_by
from surgery.rewritten_model.folded_values import fold_sites
from surgery.rewritten_model.state_dict import adapter_state_dict
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import whole
from surgery.state.base_tensors import base_tensor
from surgery.state.records import sites

__all__ = ["PeftDescription", "describe", "from_peft", "to_peft"]


_CHOOSING = ("exclude_modules", "layers_pattern", "layers_to_transform")


def to_peft(
    model: nn.Module,
    adapter: str,
    exact: bool = False,
    state: Mapping[str, Tensor] | None = None,
    original: Mapping[str, Any] | None = None,
    save_embedding_layers: Save = "auto",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter as PEFT's configuration and tensors; `SurgeryError` if that would not be the same adapter.

    Networks that only training needs are left out, as PEFT does; with `exact` they are an error. `state`: the model's
    state dict, if its tensors were gathered elsewhere. `original`: the configuration that the adapter came with, or
    some of its fields; fields that no rule has are kept. Without it, those of the loaded file are kept.
    `save_embedding_layers`: PEFT's.
    """
    if original is None or "peft_type" not in original:  # a whole configuration has all the fields that there are
        original = {**rewritten(model)[1].peft_fields.get(adapter, {}), **(original or {})}
    description = describe(model, adapter, exact, state).retaining(original)
    config, tensors = description.method.complete(description.config, _tensors(description), description.modules)
    kept = {name: value for name, value in original.items() if name in SILENT | STARTS and value is not None}
    chosen = dict.fromkeys(
        name for name in _CHOOSING if name in original
    )  # else they would choose among the rules' targets
    config = {**original, **chosen, **config, **kept, "inference_mode": True}
    if "peft_type" in kept:
        config = {name: value for name, value in config.items() if name in original}
    if config.get("task_type") is None:  # PEFT then finds the base's class by this
        kind = class_of(model)
        config["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if config.get("peft_version", "") is None:  # PEFT takes an absent one for an old one, and fails on null
        del config["peft_version"]
    method = description.method.peft_type
    main = {
        site.path
        for site in description.placed
        if is_main(site.rule) or (part := part_of(site.rule)) is not None and part.alone == method
    }
    return config, {
        **embedding_tensors(config, description.modules, main, tensors, save_embedding_layers, state),
        **tensors,
    }


def from_peft(
    model: nn.Module, adapter: str, tensors: Mapping[str, Tensor], original: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Converts tensors under PEFT's keys into those of an existing adapter, for `load_adapter_state_dict`.

    Returns the tensors (the adapter's own where none came), the missing keys, and the keys that are not the adapter's.
    `original`: the configuration that the adapter came with; what its file leaves out is not missing.
    """
    description = describe(model, adapter, exact=True).retaining(original or {})
    values = adapter_state_dict(model, adapter)
    missing, known, problems = dict[str, None](), set[str](), list[SurgeryError]()
    for name, key, entry in description.entries(list(values), tensors):
        known.add(key)
        if key not in tensors:
            missing[key] = None
            continue
        try:
            value = entry.read(tensors[key])
            why = f"{tuple(tensors[key].shape)} does not give the {tuple(values[name].shape)} of this model"
        except Exception as error:  # a reshaping of a shape that it did not expect
            value, why = None, f"{type(error).__name__}: {error}"[:300]
        if value is None or value.shape != values[name].shape:
            fix = "give tensors of an adapter with the same configuration"
            problems.append(SurgeryError(f"{key} does not fit", why=why, fix=fix))
        else:
            values[name] = value
    if problems:
        raise LoadError(problems)
    passed_over = description.method.passed_over or ("\n",)
    return values, list(missing), [key for key in tensors if key not in known and not key.endswith(passed_over)]


class PeftDescription(NamedTuple):
    """An adapter in PEFT's terms: its configuration, the places of its rules, and the tensors to save."""

    config: dict[str, Any]
    placed: Sequence[_Placed]
    tensors: Mapping[str, Tensor]
    method: PeftMethod
    modules: Modules

    def retaining(self, original: Mapping[str, Any]) -> PeftDescription:
        """The description with those fields of the original configuration that are about the file alone."""
        return self._replace(config={**self.config, **self.method.retained(original, self._live_sites())})

    def _live_sites(self) -> Iterator[tuple[Rule, LiveSite]]:
        """Yields the method's own rules, each with its site and tensors."""
        by_site: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            box, _, name = key.rpartition(".")
            by_site.setdefault(box, {})[name] = tensor
        for path, module, rule, _ in self.placed:
            if part_of(rule) is self.method:
                own = by_site.get(f"{path}.{RESERVED}" if path else RESERVED, {})
                params = {name: whole(tensor.detach()) for name, tensor in own.items()}
                read = lambda name, _, module=module, path=path: base_tensor(module, name, path)  # noqa: E731
                yield rule, LiveSite(module, path, "", params, read)

    def entries(
        self, names: Iterable[str], file: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, str, Entry]]:
        """Yields each tensor's name (of `adapter_state_dict`), its key in PEFT's file, and its conversion.

        `file`: the tensors under PEFT's keys that are read; None if the adapter's own are written.
        """
        main = frozenset(site.path for site in self.placed if is_main(site.rule))
        placed_names, by_site, names = set[str](), dict[str, list[str]](), list(names)
        for key in names:
            box, _, name = key.rpartition(".")
            by_site.setdefault(box, []).append(name)
        for path, module, rule, facts in self.placed:
            part, box = part_of(rule), f"{path}.{RESERVED}" if path else RESERVED
            if part is None:
                continue  # what comes with a rule, and has no tensors: any would be told below
            site_names, derived = by_site.get(box, []), part.derived_in(self.config)
            of_site: dict[str, Entry] = {}
            source = _Values(self, f"{box}.", path, of_site, file)
            target = path, module, rule
            place = PeftPlace(*target, tuple(site_names), main, self.modules, self.config, facts, values=source)
            of_site.update(part.entries(place))
            for name, entry in of_site.items():
                if name not in derived and name in site_names:
                    yield f"{box}.{name}", absolute(path, entry.key, self.method.prefix), entry
                    placed_names.add(f"{box}.{name}")
            placed_names.update(f"{box}.{name}" for name in derived)
        unplaced = sorted(set(names) - placed_names)
        if unplaced:
            raise unsupported(f"the tensor {unplaced[0]}", "its files have no place for it")


class _Values(NamedTuple):
    """The values of a site's tensors by name: those of PEFT's file, or the adapter's own."""

    adapter: PeftDescription
    box: str
    path: str
    entries: Mapping[str, Entry]
    file: Mapping[str, Tensor] | None

    def __call__(self, name: str) -> Tensor:
        if self.file is None:
            return whole(self.adapter.tensors[f"{self.box}{name}"].detach())
        entry = self.entries[name]
        return entry.read(self.file[absolute(self.path, entry.key, self.adapter.method.prefix)])


def describe(
    model: nn.Module, adapter: str, exact: bool = False, state: Mapping[str, Tensor] | None = None
) -> PeftDescription:
    """Describes an adapter in PEFT's terms; `SurgeryError` if PEFT's files can't hold it."""
    root, record = rewritten(model)
    adapter_names(record, adapter)
    kept, modules, all_sites = list(record.adapters[adapter]), Modules.of(model), list(sites(root))
    rules, tensors = fold_sites(record, all_sites, adapter, state)
    plainer = list(zip(kept, rules, strict=True))
    if exact and rules != kept:
        lost = next(rule.label for rule, plain in plainer if rule != plain)
        raise unsupported(f"{lost} with the network that makes its tensors", "PEFT's file holds what the network made")
    parts = [part_of(rule) for rule in rules]
    for rule, part in zip(rules, parts, strict=True):
        if part is None:
            raise unsupported(rule.label, "PEFT has nothing like it")
    methods = list(dict.fromkeys(part.peft_type for part in parts if part is not None and part.peft_type))
    alone = {part.alone if part is not None else None for part in parts}
    if not methods and len(alone) == 1 and None not in alone:
        methods = [str(*alone)]
    if len(methods) != 1:
        what = "PEFT needs a method beside them" if not methods else f"they are {len(methods)} methods of PEFT's"
        raise unsupported(" and ".join(dict.fromkeys(rule.label for rule in rules)), what)
    known, at_site = ByRule[Rule](), record.rules_at((adapter,))
    for rule, plain in plainer:
        known.get(rule, lambda plain=plain: plain)
    placed = [
        _Placed(path, module, known.get(on.rule, lambda on=on: on.rule), on.facts)
        for path, module, _ in all_sites
        for on in at_site.get(id(module), ())
    ]
    at = ByRule[list[str]]()
    for site in placed:
        at.get(site.rule, list).append(site.path)
    config: dict[str, Any] = {"peft_type": methods[0]}
    method = method_of(methods[0])
    for part in dict.fromkeys(parts):
        mine = [rule for rule, other in zip(rules, parts, strict=True) if other is part]
        assert part is not None
        settings = part.write([(rule, at.get(rule, list)) for rule in mine], modules)
        for name in [name for name in ("rank_pattern", "alpha_pattern") if name in config and name in settings]:
            settings[name] = {**config[name], **settings[name]}  # each names its own paths
        clash = [
            name for name in settings if config.get(name, settings[name]) != settings[name] and "pattern" not in name
        ]
        if clash:
            raise unsupported(" and ".join(rule.label for rule in rules), f"they differ in {', '.join(clash)}")
        lacking = [name for name in settings if name in method.lacks]
        if lacking:
            raise unsupported(" and ".join(rule.label for rule in rules), f"PEFT has no {lacking[0]} with {methods[0]}")
        config |= settings
    main = frozenset(site.path for site in placed if is_main(site.rule))
    for part in dict.fromkeys(parts):
        assert part is not None
        settled = part.settle(config, [(site.path, site.rule) for site in placed], main, modules)
        if "bias" in settled and not method.biased:
            raise unsupported(" and ".join(rule.label for rule in rules), f"PEFT has no bias with {methods[0]}")
        config |= settled
    common = {"inference_mode": True, "task_type": None, "auto_mapping": None, "revision": None}
    config = common | ({"target_modules": []} if method.targeted else {}) | config
    config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    on = {site.path for site in placed if isinstance(part_of(site.rule), PeftMethod)}
    if method.targeted and chosen_by(config, modules) != on:
        raise unsupported(rules[0].label, "PEFT would find other modules by these targets")
    return PeftDescription(config, placed, tensors, method, modules)


class _Placed(NamedTuple):
    path: str
    module: nn.Module
    rule: Rule
    facts: Mapping[str, Any]


def _tensors(adapter: PeftDescription) -> dict[str, Tensor]:
    by_key: dict[str, list[Tensor]] = {}
    for name, key, entry in adapter.entries(adapter.tensors):
        by_key.setdefault(key, []).append(entry.write(whole(adapter.tensors[name].detach())))
    on = [site.module for site in adapter.placed if part_of(site.rule) is adapter.method]
    return {key: adapter.method.join(key, together, on) for key, together in by_key.items()}
