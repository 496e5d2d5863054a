"""What goes with any of PEFT's methods: modules_to_save, and the biases that LoRA trains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from surgery import PeftConfig, PeftEntry, PeftPart, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules.bias import BiasRule
from surgery.rules.peft.tasks import HEADS, ending
from surgery.rules.train import TrainRule


@peft_method
class Trained(PeftPart):
    rule = TrainRule

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        names = config.take("modules_to_save") or ()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise SurgeryError("PEFT's modules_to_save is not a list of names")
        paths = ending(config.modules.by_path, [*names, *_heads(config)])
        if paths:  # PEFT passes over names that fit none: its classification task adds "score" and "classifier"
            yield TrainRule(targets=config.regular(paths))

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        names = dict(place.module.named_parameters()) | dict(place.module.named_buffers())
        by_name = {name.replace(".", "_"): name for name in names}
        return {name: PeftEntry(by_name[name]) for name in place.names if name in by_name}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        paths = [path for _, inner in placed for path in inner]
        if set(ending(modules.by_path, paths)) != set(paths):
            raise SurgeryError("PEFT's format can't hold this TrainRule", why="PEFT would train further modules, too")
        return {"modules_to_save": paths}


def _heads(config: PeftConfig) -> list[str]:
    """The heads that are in the file because of its task: PEFT up to 0.6 did not name them in the configuration."""
    task, keys = config.data.get("task_type"), config.file.shapes if config.file is not None else ()
    heads = ending(config.modules.by_path, HEADS.get(task, ()) if isinstance(task, str) else ())
    starts = [(path, f"{start}{path}.") for path in heads for start in ("base_model.model.", "base_model.")]
    names = {path: [name for name, _ in config.modules.by_path[path].named_parameters()] for path in heads}
    return [path for path, start in starts if any(start + name in keys for name in names[path])]


@peft_method
class Biases(PeftPart):
    """Written and read by LoRA's field `bias`, of which they are companions."""

    rule = BiasRule

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        names = {name.replace(".", "_"): name for name, _ in place.module.named_parameters()}
        entries = {}
        for name in (name for name in place.names if name in names):  # the site may have LoRA's tensors, too
            full = names[name]
            if place.path in place.main:  # PEFT's layer stands around the module
                full = "base_layer." + re.sub(r"^out_proj\.", "out_proj.base_layer.", full)
            entries[name] = PeftEntry(full)
        return entries

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        raise SurgeryError("PEFT's format can't hold a BiasRule of its own", fix='LoraRule(…, bias="all")')
