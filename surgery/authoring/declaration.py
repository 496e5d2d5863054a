"""A rule as data: its targets, its fields, and their conversion to and from plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from surgery.authoring.rule_names import check_named, registered
from surgery.errors import RuleError
from surgery.patterns.pattern import Pattern
from surgery.patterns.targets import Targets, normalise_targets

__all__ = ["Declaration"]

D = TypeVar("D", bound="Declaration")


@dataclass(frozen=True)
class Declaration:
    """The fields of every rule, and their plain form. `Rule` (`surgery.authoring.rule`) adds the behaviour."""

    targets: Targets = ()
    _: KW_ONLY
    exclude: Targets = ()
    layers: int | Sequence[int] | None = None
    expect: int | None = None

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    identity: ClassVar[bool] = False  # the output is unchanged at initialisation
    exclusive: ClassVar[bool] = False  # no other rule of the adapter may be at its sites
    repeatable: ClassVar[bool] = False  # an adapter may have several rules of this kind at a site
    skips_calls: ClassVar[bool] = False  # kinds of calls for which its rewrite returns NotImplemented run as they are
    skips_sites: ClassVar[bool] = False  # modules that it can't rewrite stay, with a warning, if it rewrites others
    imports: ClassVar[bool] = False  # its fields name code to import
    scalable: ClassVar[bool] = True  # its change can be multiplied by a weight

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "targets", normalise_targets(self.targets))
        set_field(self, "exclude", normalise_targets(self.exclude))
        if isinstance(self.layers, int):
            set_field(self, "layers", (self.layers,))
        for field in fields(self):
            set_field(self, field.name, _normalise(getattr(self, field.name)))
        if self.layers is not None and not all(type(index) is int and index >= 0 for index in cast(tuple, self.layers)):
            raise self.bad("layers", "indices of layers, from 0")
        if self.expect is not None and (type(self.expect) is not int or self.expect < 0):
            raise self.bad("expect", "how many modules the targets must match")
        self.validate()

    def validate(self) -> None:
        """Raise `self.bad(field, wanted)` for a value out of range. Called when the rule is constructed."""

    def hides(self, other: Declaration) -> str | None:
        """Returns why this rule, live at a site after another adapter's rule, hides what that rule does, or None."""
        return None

    def covered_by(self, other: Declaration, module: nn.Module) -> bool:
        """Whether another rule of the same adapter at a module does this rule's work. The plan leaves it out there.

        Default: False.
        """
        return False

    @property
    def label(self) -> str:
        return type(self).__name__

    def differing_fields(self, other: Declaration) -> list[str]:
        """Returns the fields that differ from another rule of this class, without targets and initial values."""
        ignored = {field.name for field in fields(Declaration)} | {"init"}
        compared = [field.name for field in fields(self) if field.name not in ignored]
        return [name for name in compared if getattr(self, name) != getattr(other, name)]

    def bad(self, field: str, wanted: str) -> RuleError:
        """Build the error for a field with an invalid value. `wanted` completes "… is not"."""
        return RuleError(f"{self.label}: {field}={getattr(self, field)!r} is not {wanted}")

    def replace(self: D, **changes: Any) -> D:
        """Copy the rule with other values of some fields.

        >>> from surgery.rules import LoraRule
        >>> LoraRule("query", rank=4).replace(rank=8).rank
        8
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Convert the rule to plain data: its name, its version and its fields.

        Raises:
            RuleError: A field has a value that is not data, such as a tensor or a `Pattern.where`; or the class is not
                decorated with `@rule`.
        """
        check_named(type(self))
        data: dict[str, Any] = {"rule": self.name, "version": self.version}
        for field in fields(self):
            data[field.name] = _to_data(getattr(self, field.name), f"{self.label}.{field.name}")
        return data

    @classmethod
    def from_dict(cls: type[D], data: Mapping[str, Any]) -> D:
        """Build a rule from the data of `to_dict`.

        Raises:
            RuleError: The rule or a field is unknown, or the version is newer than this package's.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("rule"), str):
            raise RuleError(f"{data!r} is not a rule", why='a rule is a mapping with a name under "rule"')
        kind = registered(data["rule"])
        values = {key: value for key, value in data.items() if key not in ("rule", "version")}
        version = data.get("version", kind.version)
        if type(version) is not int or version < 1:
            raise RuleError(f"{kind.name}: {version!r} is not a version", fix="write a whole number from 1")
        if version > kind.version:
            raise RuleError(
                f"{kind.name}: version {version} is newer than the installed version {kind.version}",
                why="a later release wrote the rule",
                fix="update the package that defines the rule",
            )
        return kind(**kind.upgrade(values, version))

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        """Convert fields that an older version wrote to the names of this version."""
        return data


def _normalise(value: Any) -> Any:
    """Convert lists to tuples and dtypes to names, so that a rule equals itself after `to_dict` and `from_dict`."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return tuple(_normalise(item) for item in value)
    if isinstance(value, dict):
        return {key: _normalise(item) for key, item in value.items()}
    return value


def _to_data(value: Any, where: str) -> Any:
    if isinstance(value, Pattern):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_to_data(item, where) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_data(item, where) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    described = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise RuleError(
        f"{where} can't be written", why=f"{described} is not data", fix="use numbers, strings, lists and mappings"
    )
