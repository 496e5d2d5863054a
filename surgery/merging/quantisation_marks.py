"""What transformers notes about a quantised model, while its quantised modules are plain Linears."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from surgery.packed.packed_map import packed_by_name
from surgery.patterns.module_walk import base_modules
from surgery.state.records import ModelState
from surgery.transaction.undo_log import Journal

__all__ = ["restore_marks", "take_off_marks", "take_off_one_way_conversions"]

_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")


def take_off_marks(model: nn.Module, plain: list[str], state: ModelState | None, journal: Journal) -> None:
    """Let the model and its config say which modules are quantised now.

    If no module is quantised any more, the marks of transformers and `config.quantization_config` are taken off.
    Otherwise the modules at the paths `plain` are added to the config's list of modules that are not quantised.
    `state`: notes what was there, for `restore_marks`.
    """
    modules = list(base_modules(model))
    remaining = any(packed_by_name(module) for _, module in modules)
    # Without a list, transformers chooses modules such as the head itself; with a list, these alone.
    unpacked = [p for p, m in modules if isinstance(m, nn.Linear) and p not in plain and not packed_by_name(m)]
    changes: dict[int, tuple[Any, dict[str, Any]]] = {}  # the objects to change, and their new entries
    copies: dict[int, Any] = {}
    for _, module in modules:
        config = module.__dict__.get("config")
        if not remaining:
            changes |= {id(owner): (owner, {}) for owner in (module, config) if hasattr(owner, "__dict__")}
            continue
        for owner in (config, module.__dict__.get("hf_quantizer")):
            noted = getattr(owner, "__dict__", {}).get("quantization_config")
            if not hasattr(noted, "__dict__"):
                continue
            if id(noted) not in copies:  # the caller of from_pretrained has the same object, and may use it again
                copies[id(noted)] = copy.copy(noted)
                skipped = {name: noted.__dict__[name] for name in _SKIPPED if name in noted.__dict__}
                copies[id(noted)].__dict__.update({n: [*(value or unpacked), *plain] for n, value in skipped.items()})
            changes[id(owner)] = owner, {"quantization_config": copies[id(noted)]}
    for owner, after in changes.values():
        names = after or (*_MARKS, "quantization_config")
        before = {name: owner.__dict__[name] for name in names if name in owner.__dict__}
        if not before:
            continue
        journal.keep(owner.__dict__)
        for name in before.keys() - after.keys():
            del owner.__dict__[name]
        owner.__dict__.update(after)
        if state is not None:
            state.unquantised.append((owner, before))
    take_off_one_way_conversions(model, state, journal)


def take_off_one_way_conversions(model: nn.Module, state: ModelState | None, journal: Journal) -> None:
    """Take off conversions of files that transformers can't make backwards, such as that of bitsandbytes' codes.

    Otherwise `save_pretrained` fails for a model from a quantised checkpoint. The state dict of such a module already
    has the names of the files, and that of a plain Linear needs no conversion. `state`: as for `take_off_marks`.
    """
    for _, module in base_modules(model):
        conversions = module.__dict__.get("_weight_conversions")
        both_ways = [conversion for conversion in conversions or () if _reverses(conversion)]
        if conversions and len(both_ways) < len(conversions):
            journal.keep(module.__dict__)
            module.__dict__["_weight_conversions"] = both_ways
            if state is not None:
                state.unquantised.append((module, {"_weight_conversions": conversions}))


def _reverses(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    except Exception:  # transformers' own error, which save_pretrained raises
        return True
    return True


def restore_marks(state: ModelState, journal: Journal) -> None:
    """Put back what `take_off_marks` took off."""
    for owner, before in state.unquantised:
        journal.keep(owner.__dict__)
        owner.__dict__.update(before)
    state.unquantised = []
