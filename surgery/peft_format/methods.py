"""What all methods in PEFT's files share, and how they are read. A method's own part is beside its rule.

A method is a `PeftMethod`: its rule, and the rule's fields and tensors under PEFT's names. It is looked up by its
peft_type. A package that offers rules (entry points `surgery.rules`) registers its own methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import PlanError, RuleError, SurgeryError, SurgeryWarning, near_misses
from surgery.patterns.pattern import qualified_name
from surgery.peft_format.adapter_config import PeftConfig, choose
from surgery.peft_format.key_history import PREFIX
from surgery.peft_format.targets import Modules, fields_of
from surgery.state.base_tensors import base_tensor

__all__ = ["PeftMethod", "PeftPart", "PeftPlace", "peft_method", "structure_rules"]


def _no_value(name: str) -> Tensor:
    raise SurgeryError(f"the values of {name} are not known here")


@dataclass(frozen=True)
class PeftPlace:
    """One rule at one module, for which tensors are looked up.

    `main`: the paths that the method itself is on. `facts`: what the rule recorded about the module (`Site.fact`).
    `file_keys`: the keys of the file that is read. `values`: the adapter's tensors here by name, as the rule has them,
    for conversions that need more than one.
    """

    path: str
    module: nn.Module
    rule: Rule
    names: tuple[str, ...]
    main: Set[str]
    modules: Modules
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    file_keys: Collection[str] = ()
    values: Callable[[str], Tensor] = field(default=_no_value, compare=False)

    def base(self, name: str) -> Tensor:
        """A tensor of the module without what is merged into it."""
        return base_tensor(self.module, name, self.path)


P = TypeVar("P", bound="PeftPart")
Placed = Sequence[tuple[Rule, Sequence[str]]]


class PeftPart:
    """The names of one kind of rule's tensors in PEFT's files.

    `tensors`: the rule's name of a tensor → what follows the module's path in PEFT's key, where the numbers are the
    same. `derived`: tensors that PEFT does not write, because they follow from the fields.
    """

    rule: ClassVar[type[Rule]]
    peft_type: ClassVar[str | None] = None  # of what belongs to one method
    tensors: ClassVar[Mapping[str, str]] = {}
    derived: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[str | None] = None  # the method of an adapter that has these rules and no others
    layer: ClassVar[str] = ""  # PEFT's class of the module for such a rule; a method's own layers have its name

    def entries(self, place: PeftPlace) -> dict[str, Entry]:
        """The key of each tensor: relative to the module's path, or, after "/", to the whole file."""
        return {name: Entry(self.tensors[name]) for name in place.names if name in self.tensors}

    def derived_in(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The tensors that PEFT does not write with this configuration."""
        return self.derived

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        """The rules that a configuration contains beside the method's own, by a field of this part."""
        return ()

    def structure(self, config: PeftConfig) -> Iterable[Rule]:
        """Structural rules that a configuration contains: the other rules are read on the model that they make."""
        return ()

    def base(self, config: PeftConfig) -> Iterable[Rule]:
        """Rules for tensors of the base that are in the file; they precede all others."""
        return ()

    def write(self, placed: Placed, modules: Modules) -> dict[str, Any]:
        """The configuration's fields for these rules, each with the paths it is on."""
        raise NotImplementedError

    def settle(
        self, config: Mapping[str, Any], placed: Sequence[tuple[str, Rule]], main: Set[str], modules: Modules
    ) -> dict[str, Any]:
        """Fields that depend on all rules of the adapter: `placed` has each path with its rule, `main` the method's."""
        return {}


class PeftMethod(PeftPart):
    """One of PEFT's methods. `fields`: PEFT's name → the rule's field with the same meaning and value.

    `inits`: value of PEFT's `init_field` → the rule's `init`. For a saved adapter the start is past, except if it
    changes the base. A field that is absent or null gets the rule's default, which is PEFT's.
    """

    peft_type: ClassVar[str | None]
    fields: ClassVar[Mapping[str, str]] = {}
    init_field: ClassVar[str] = "init_weights"
    inits: ClassVar[Mapping[Any, str]] = {True: "identity", False: "random"}
    passed_over: ClassVar[tuple[str, ...]] = ()  # ends of keys that change no result
    targeted: ClassVar[bool] = True  # whether its configuration names modules
    marks: ClassVar[tuple[str, ...]] = ()  # what PEFT's keys have after a path, to find the paths by
    prefix: ClassVar[str] = PREFIX  # what its keys have before a path
    lacks: ClassVar[tuple[str, ...]] = (  # fields of other parts
        "trainable_token_indices",
        "ensure_weight_tying",
        "layer_replication",
    )
    biased: ClassVar[bool] = False  # whether its configuration has a field `bias`

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        config.marks = self.marks or tuple(self.tensors.values())
        rule_fields = {ours: config.take(theirs) for theirs, ours in self.fields.items()}
        rule_fields = {name: value for name, value in rule_fields.items() if value is not None and value != {}}
        names = {field.name for field in fields(self.rule)}
        start = config.take(self.init_field, True)
        if "init" in names:
            if not isinstance(start, (bool, str)) or start not in self.inits:
                known = ", ".join(repr(name) for name in self.inits)
                raise config.refuse(
                    self.init_field, f"Unknown initialization {self.init_field}={start!r}", f"one of {known}"
                )
            rule_fields["init"] = self.inits[start]
        rule_fields |= self.read_fields(config)
        return [choose(config, self.rule, rule_fields)]

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        """The rules of a new adapter, whose tensors do not exist yet; by default those of a saved one."""
        return self.read(config)

    def start_tensors(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a file, under PEFT's keys, with which a new adapter starts; by default none."""
        return {}

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        """Reads fields that are not plain copies, and checks fields of which only one value is supported."""
        return {}

    def write(self, placed: Placed, modules: Modules) -> dict[str, Any]:
        (rule, paths), *more = placed
        if more:
            raise unsupported(f"{len(placed)} {rule.label}s", "it holds one")
        if getattr(rule, "dtype", None) not in (None, "float32"):
            raise unsupported(f"{rule.label}(dtype={rule.dtype!r})", "PEFT computes in float32")  # type: ignore[attr-defined]
        config = {theirs: _plain(getattr(rule, ours)) for theirs, ours in self.fields.items()}
        if self.inits and "init" in {field.name for field in fields(rule)}:
            starts = {ours: theirs for theirs, ours in reversed(list(self.inits.items()))}
            if rule.init not in starts:  # type: ignore[attr-defined]
                raise unsupported(f"{rule.label}(init={rule.init!r})", "it changes the base in a way PEFT can't repeat")  # type: ignore[attr-defined]
            config[self.init_field] = starts[rule.init]  # type: ignore[attr-defined]
        return {**config, **self.write_fields(rule), **fields_of(rule, modules, paths)}

    def write_fields(self, rule: Rule) -> dict[str, Any]:
        """The inverse of `read_fields`."""
        return {}

    def retained(self, original: Mapping[str, Any], live: Iterable[tuple[Rule, LiveSite]]) -> dict[str, Any]:
        """Fields about the file alone, of the configuration that the adapter came with, if its tensors allow them."""
        return {}

    def join(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> Tensor:
        """One tensor of the file for several sites that share it; each tensor came through its entry's `write`."""
        return only_one(key, tensors)

    def loss_of(self, model: nn.Module, adapter: str) -> Tensor | None:
        """What PEFT's model adds to the loss of a call with an adapter of this method; None for nothing."""
        return None

    def allocator_of(self, model: nn.Module, adapter: str) -> Any:
        """An object with PEFT's `update_and_allocate(step)` for an adapter of this method; None where PEFT has none."""
        return None

    @property
    def has_call_context(self) -> bool:
        return type(self).call_context is not PeftMethod.call_context

    def call_context(self, keywords: dict[str, Any]) -> AbstractContextManager[Any]:
        """Takes the keywords that only PEFT's calls with this method have; returns the context of their effect."""
        return nullcontext()

    def complete(
        self, config: dict[str, Any], tensors: dict[str, Tensor], modules: Modules
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the file's tensors, with everything else that PEFT expects there."""
        return config, tensors


_parts: dict[type[Rule], PeftPart] = {}
_methods: dict[str, PeftMethod] = {}


def peft_method(cls: type[P]) -> type[P]:
    """Register a `PeftMethod`, or a `PeftPart` that goes with any method, for reading and writing PEFT's files.

    Raises `SurgeryError` if another class is registered for the same `peft_type`.
    """
    part = cls()
    other = _methods.get(str(part.peft_type))
    if isinstance(part, PeftMethod) and other is not None and qualified_name(type(other)) != qualified_name(cls):
        raise SurgeryError(
            f"PEFT's {part.peft_type!r} already has the class {qualified_name(type(other))}",
            where=qualified_name(cls),
            fix="register only one class per method",
        )
    _parts[part.rule] = part
    if isinstance(part, PeftMethod):
        _methods[str(part.peft_type)] = part
    return cls


def _load() -> None:
    for entry in metadata.entry_points(group="surgery.rules"):
        entry.load()


def method_of(name: Any) -> PeftMethod:
    if isinstance(name, str):
        if name not in _methods:
            _load()
        if name in _methods:
            return _methods[name]
    raise SurgeryError(
        f"PEFT's {str(name)[:60]!r} is not among the methods that can be read here",
        why=near_misses(str(name)[:60], _methods) or f"they are {', '.join(sorted(_methods))}",
        fix="register the method with @peft_method, in a package that has the entry point group surgery.rules",
    )


def part_of(rule: Rule) -> PeftPart | None:
    if not _parts:
        _load()
    return next((_parts[cls] for cls in type(rule).__mro__ if cls in _parts), None)


def is_main(rule: Rule) -> bool:
    part = part_of(rule)
    return part is not None and part.peft_type is not None


# Reading ------------------------------------------------------------------------------------------------------


def rules_by(model: nn.Module, config: Mapping[str, Any]) -> list[Rule]:
    """The rules of a new adapter by PEFT's configuration. `PlanError` lists everything that is not supported."""
    settings = PeftConfig(config, Modules.of(model))
    rules, problems, unheld = read_rules(settings, method_of(config.get("peft_type")).start)
    if problems or unheld:
        raise PlanError([*problems, *unheld])
    for note in settings.notes:
        warnings.warn(note, SurgeryWarning, stacklevel=4)
    return rules


def structure_rules(settings: PeftConfig) -> list[Rule]:
    """The structural rules of a configuration."""
    _load()
    return [rule for part in _parts.values() for rule in part.structure(settings)]


def read_rules(
    settings: PeftConfig, main: Callable[[PeftConfig], Iterable[Rule]]
) -> tuple[list[Rule], list[SurgeryError], list[SurgeryError]]:
    """The rules of a configuration, its problems, and the fields that no rule holds."""
    rules, problems = list[Rule](), list[SurgeryError]()
    parts = [part for part in _parts.values() if not isinstance(part, PeftMethod)]
    for read in (*(part.base for part in parts), main, *(part.read for part in parts)):
        try:
            rules += read(settings)
        except SurgeryError as error:
            problems.append(error)
        except Exception as error:  # fields of a file may have any type
            problems.append(RuleError("the configuration can't be read", why=f"{type(error).__name__}: {error}"[:300]))
    return rules, problems, [] if problems else settings.untaken()  # else no one came to the further fields


def absolute(path: str, key: str, prefix: str) -> str:
    return key[1:] if key.startswith("/") else f"{prefix}{path}.{key}" if path else f"{prefix}{key}"


def only_one(key: str, tensors: Sequence[Tensor]) -> Tensor:
    if any(tensor.shape != tensors[0].shape or not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise unsupported(f"sites with tensors of their own for {key}", "PEFT's sites share one")
    return tensors[0]


def unsupported(what: str, why: str) -> SurgeryError:
    return SurgeryError(
        f"PEFT's format can't hold {what}", why=why, fix='save_adapter(…, format="surgery") holds any rules'
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
