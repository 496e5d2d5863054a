"""PEFT's configuration of an adapter: readers take its fields, and fields that nobody takes are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.rule import Rule
from surgery.errors import MatchError, SurgeryError
from surgery.patterns.paths import endings, pattern_matcher, regex_for
from surgery.peft_format.targets import ALL, Modules, by_keys, chosen_by, is_all, is_plain, is_text
from surgery.state.base_tensors import base_tensor

__all__ = ["SILENT", "STARTS", "PeftConfig", "choose", "kept_fields"]

R = TypeVar("R", bound=Rule)

# Fields that say nothing about what an adapter computes.
SILENT = frozenset(
    "peft_type peft_version task_type inference_mode auto_mapping base_model_name_or_path revision megatron_core "
    "runtime_config loftq_config eva_config qalora_group_size _library_name low_cpu_mem_usage "
    "prompt_tuning_init".split()
)
# Fields that tell only how the adapter started. A rule does not know them; the configuration that it came with does.
STARTS = frozenset({"prompt_tuning_init"})
# Fields that a loaded adapter keeps for its next save. Others tell of one file, or of how the adapter started.
KEPT = frozenset({"task_type", "base_model_name_or_path", "revision"})


def kept_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that no rule has, and that a loaded adapter keeps."""
    return {name: value for name, value in config.items() if name in KEPT and value and isinstance(value, str)}


class PeftConfig:
    """A configuration that is being read. Fields that no reader takes are errors, unless they hold a no-op value."""

    def __init__(self, data: Mapping[str, Any], modules: Modules, file: TensorFile | None = None):
        self.data, self.model, self.modules, self.file = dict(data), modules.model, modules, file
        self.left = set(self.data) - SILENT
        self.notes: list[str] = []
        self.marks: tuple[str, ...] = ()  # what the method's keys have after a path
        self.assumed: list[str] = []  # what is to be told of the file
        self.passed_over: list[str] = []  # keys that change no result, as those of the base's own tensors
        self.vocabulary: set[int] = set()  # rows of the file's embeddings, where the model has another number

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value; the default if it is absent or null."""
        self.left.discard(name)
        value = self.data.get(name)
        return default if value is None else value

    @cached_property
    def targeted(self) -> set[str]:
        """The paths of the configuration's targets; if it names none, those of the file's keys."""
        if not self.data.get("target_modules"):
            return set(by_keys(self.file.shapes if self.file is not None else (), self.modules, self.marks))
        return chosen_by(self.data, self.modules)

    def fitting(self, name: str) -> dict[str, Any] | None:
        """A mapping from patterns of paths, without patterns that match no target: PEFT ignores them."""
        patterns, paths = self.take(name, {}), self.targeted
        named = {ending for path in paths for ending in endings(path)} if patterns else set()

        def fits(key: str) -> bool:
            plain = re.fullmatch(r"(?:[\w.\-]|\\\W)*", key)  # there may be one for each path
            if plain and re.sub(r"\\(\W)", r"\1", key) in named:
                return True
            return any(map(pattern_matcher(key), paths))

        return {key: value for key, value in patterns.items() if fits(key)} or None

    def value(self, path: str, name: str) -> Tensor:
        """A tensor of the base; that of an offloaded module with its values."""
        return base_tensor(self.modules.by_path[path], name, path)

    @staticmethod
    def regular(paths: Sequence[str]) -> str:
        """A target for exactly these paths."""
        return regex_for(paths)

    def refuse(self, name: str, why: str, fix: str | None = None) -> SurgeryError:
        return SurgeryError(f"PEFT's {name}={str(self.data.get(name))[:100]!r} can't be held exactly", why=why, fix=fix)

    def silent(self, *names: str) -> None:
        """Marks fields that do not change what this method computes."""
        self.left -= set(names)

    def only(self, name: str, *values: Any, why: str = "it is not supported") -> None:
        if self.take(name, values[0]) not in values:
            raise self.refuse(name, why)

    def untaken(self) -> list[SurgeryError]:
        unread = sorted(name for name in self.left if self.data[name] not in (None, False, "", [], {}, "none", 0))
        return [self.refuse(name, "no rule here has such a field") for name in unread]


def choose(config: PeftConfig, kind: type[R], rule_fields: Mapping[str, Any]) -> R:
    """The rule on the configuration's modules; it keeps the configuration's own targets if they mean the same here."""
    targets, exclude = config.take("target_modules"), config.take("exclude_modules")
    layers, _ = config.take("layers_to_transform"), config.take("layers_pattern")
    for name, value in (("target_modules", targets), ("exclude_modules", exclude)):
        plain = isinstance(value, (str, type(None))) or isinstance(value, list) and all(map(is_text, value))
        if not plain:
            raise SurgeryError(f"PEFT's {name} is neither a text nor a list of names")
    if layers not in (None, []) and isinstance(targets, str):
        raise config.refuse(
            "layers_to_transform", "PEFT takes layers with a list of names alone", "name them in the text"
        )
    if config.data.get("layers_pattern") and layers is None:
        raise config.refuse(
            "layers_pattern", "PEFT takes it with layers_to_transform alone", "say which layers are meant"
        )
    if is_all(targets):
        short = kind(targets=ALL, exclude=_words(exclude), **rule_fields)
        wanted = config.targeted
        return (
            short if config.modules.matched(short) == wanted else kind(targets=regex_for(sorted(wanted)), **rule_fields)
        )
    if not targets:
        return kind(targets=regex_for(sorted(config.targeted)), **rule_fields)
    wanted = config.targeted
    if not all(map(is_plain, targets if isinstance(targets, list) else ())):  # in a list PEFT has names alone
        return kind(targets=regex_for(sorted(wanted)), **rule_fields)
    short = kind(targets=_words(targets), exclude=_words(exclude), layers=layers or None, **rule_fields)
    matched = config.modules.matched(short)
    if not wanted and matched:
        raise _none_left(config, sorted(matched))
    same = not config.data.get("layers_pattern") and matched == wanted
    return short if same or not wanted else kind(targets=regex_for(sorted(wanted)), **rule_fields)


def _none_left(config: PeftConfig, matched: Sequence[str]) -> MatchError:
    """The error for targets that match modules, of which the other fields leave none."""
    around = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    settings = ", ".join(
        f"{name}={config.data[name]!r}" for name in around if config.data.get(name) not in (None, [], "")
    )
    return MatchError(
        f"PEFT's target_modules={str(config.data.get('target_modules'))[:100]} leave no module",
        why=f"they fit {matched[0]}{', …' if len(matched) > 1 else ''}, which {settings[:200]} leaves out",
        fix="correct these fields",
    )


def _words(value: Any) -> Any:
    """PEFT's targets as a rule's: a single text is a regular expression."""
    return f"re:{value}" if isinstance(value, str) and value else value or ()
