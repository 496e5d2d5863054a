"""Reads an adapter from PEFT's files: its rules, the places of their tensors, and what was assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError
from surgery.peft_format.adapter_config import PeftConfig, kept_fields
from surgery.peft_format.base_structure import restructured
from surgery.peft_format.header_settings import alphas_of, check_alphas, settings_of
from surgery.peft_format.key_history import Spelt
from surgery.peft_format.keys import at_model_paths, keys_of
from surgery.peft_format.methods import PeftPlace, absolute, is_main, method_of, part_of, read_rules
from surgery.peft_format.targets import Modules
from surgery.planning.plan import Plan

__all__ = ["PeftAdapter", "read"]


@dataclass
class PeftAdapter:
    rules: list[Rule]
    entry: Callable[[Plan, PlannedRule, str], Entry | None]
    problems: list[SurgeryError]
    unheld: list[SurgeryError]
    notes: list[str]
    assumed: list[str]
    ignored: tuple[str, ...]
    vocabulary: set[int]
    fields: dict[str, Any]


def read(model: nn.Module, config: Any, file: TensorFile, component: str | None = None) -> PeftAdapter:
    """The rules of an adapter in PEFT's files, and the places of their tensors."""
    with restructured(model, config if isinstance(config, dict) else {}):
        return _read(model, config, file, component)


def _read(model: nn.Module, config: Any, file: TensorFile, component: str | None) -> PeftAdapter:
    modules = Modules.of(model)
    spelt = keys_of(modules.by_path, file, component)
    keys, assumed, alpha_keys = spelt.keys, list[str](), tuple[str, ...]()
    if config is None:
        from_header = settings_of(spelt, file)
        config, assumed, alpha_keys = from_header.config, from_header.assumed, from_header.passed_over
    elif isinstance(config, dict) and (alphas := alphas_of(spelt, file)):
        check_alphas(config, alphas, spelt, "the configuration")
        alpha_keys = tuple(alphas)
    if not isinstance(config, dict):
        raise SurgeryError("the adapter's configuration is not a mapping")
    config = at_model_paths(config, spelt)
    settings = PeftConfig(config, modules, _under(keys, file))
    method = method_of(config.get("peft_type"))
    rules, problems, unheld = read_rules(settings, method.read)

    placed: dict[int, Mapping[str, Entry | None]] = {}  # by step, of the plan that is asked about
    main = set[str]()

    def entry(plan: Plan, step: PlannedRule, name: str) -> Entry | None:
        if not placed:
            main.update(s.path for s in plan.steps if is_main(s.rule))
        if id(step) not in placed:
            placed[id(step)] = _of_step(step, keys, main, settings, method.prefix)
        return placed[id(step)][name]

    ignored = tuple(key for key in file.shapes if key.endswith(method.passed_over or ("\n",)))
    assumed += [*_describe(spelt), *settings.assumed]
    ignored = (*ignored, *alpha_keys, *spelt.others, *(keys[key] for key in settings.passed_over))
    fields = kept_fields(config)
    return PeftAdapter(rules, entry, problems, unheld, settings.notes, assumed, ignored, settings.vocabulary, fields)


def _under(keys: Mapping[str, str], file: TensorFile) -> TensorFile:
    """The file with today's keys."""
    shapes = {key: file.shapes[there] for key, there in keys.items()}
    dtypes = {key: file.dtypes[there] for key, there in keys.items()}
    return TensorFile(shapes, dtypes, file.metadata, lambda key: file.read(keys[key]))


def _describe(spelt: Spelt) -> list[str]:
    """What the file's keys were assumed to mean."""
    notes = []
    if spelt.others and spelt.component:
        notes.append(f"of a file of several components, {spelt.component} was loaded")
    if spelt.moved:
        there, here = next(iter(spelt.moved.items()))
        notes.append(f"{len(spelt.moved)} modules have other paths in the file, such as {there} for {here}")
    return notes


def _of_step(
    step: PlannedRule, keys: Mapping[str, str], main: Set[str], config: PeftConfig, prefix: str
) -> dict[str, Entry | None]:
    """The file's entry of each tensor of a step; None for tensors that follow from the rule's fields."""
    part, names = part_of(step.rule), tuple(spec.name for spec in step.specs)
    assert part is not None

    def value(name: str) -> Tensor:
        assert config.file is not None
        return entries[name].read(config.file.read(absolute(step.path, entries[name].key, prefix)))

    target = step.path, step.module, step.rule
    place = PeftPlace(*target, names, main, config.modules, config.data, step.facts, keys, value)
    entries = part.entries(place)
    located: dict[str, Entry | None] = dict.fromkeys(names)
    derived = part.derived_in(config.data)
    for name in names:
        if name not in derived:
            key = absolute(step.path, entries[name].key, prefix)
            located[name] = entries[name]._replace(key=keys.get(key, key))
    return located
