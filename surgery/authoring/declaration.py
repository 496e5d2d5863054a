"""A rule as data: which modules it goes to, its own fields, and both as plain values to write and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from surgery.authoring.rule_names import registered
from surgery.errors import RuleError
from surgery.patterns.pattern import Pattern, Targets, normalise_targets

__all__ = ["Declaration"]

D = TypeVar("D", bound="Declaration")


@dataclass(frozen=True)
class Declaration:
    """The fields of every rule, and their plain form. `Rule` (`surgery.authoring.rule`) adds what a rule does."""

    targets: Targets = ()
    _: KW_ONLY
    exclude: Targets = ()
    layers: int | Sequence[int] | None = None
    expect: int | None = None

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    identity: ClassVar[bool] = False  # the output is unchanged at initialisation
    exclusive: ClassVar[bool] = False  # no other rule of the adapter may be at its sites
    imports: ClassVar[bool] = False  # its fields name code to import
    scalable: ClassVar[bool] = True  # its change can be multiplied by a weight

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "targets", normalise_targets(self.targets))
        put(self, "exclude", normalise_targets(self.exclude))
        if isinstance(self.layers, int):
            put(self, "layers", (self.layers,))
        for field in fields(self):
            put(self, field.name, _plain(getattr(self, field.name)))
        if self.layers is not None and not all(type(index) is int and index >= 0 for index in cast(tuple, self.layers)):
            raise self.bad("layers", "indices of layers, from 0")
        if self.expect is not None and (type(self.expect) is not int or self.expect < 0):
            raise self.bad("expect", "how many modules the targets must match")
        self.validate()

    def validate(self) -> None:
        """Raise `self.bad(field, wanted)` for a value out of range. Called when the rule is made."""

    @property
    def label(self) -> str:
        return type(self).__name__

    def differing(self, other: Declaration) -> list[str]:
        """The fields in which another rule of its kind differs, but for where the two go and how they start."""
        aside = {field.name for field in fields(Declaration)} | {"init"}
        mine = [field.name for field in fields(self) if field.name not in aside]
        return [name for name in mine if getattr(self, name) != getattr(other, name)]

    def bad(self, field: str, wanted: str) -> RuleError:
        return RuleError(f"{self.label}: {field}={getattr(self, field)!r} is not {wanted}")

    def replace(self: D, **changes: Any) -> D:
        """The same rule with other fields.

        >>> from surgery.rules import LoraRule
        >>> LoraRule("query", rank=4).replace(rank=8).rank
        8
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the rule's name, its version and its fields."""
        data: dict[str, Any] = {"rule": self.name, "version": self.version}
        for field in fields(self):
            data[field.name] = _written(getattr(self, field.name), f"{self.label}.{field.name}")
        return data

    @classmethod
    def from_dict(cls: type[D], data: Mapping[str, Any]) -> D:
        """The rule that `to_dict` wrote. `RuleError` for an unknown rule or field, or a version from the future."""
        if not isinstance(data, Mapping) or not isinstance(data.get("rule"), str):
            raise RuleError(f"{data!r} is not a rule", why='a rule is a mapping with a name under "rule"')
        kind = registered(data["rule"])
        given = {key: value for key, value in data.items() if key not in ("rule", "version")}
        version = data.get("version", kind.version)
        if type(version) is not int or version < 1:
            raise RuleError(f"{kind.name}: version {version!r} is no version", fix="a whole number from 1")
        if version > kind.version:
            raise RuleError(
                f"{kind.name}: version {version} is newer than this one, {kind.version}",
                why="the rule was written by a later release",
                fix="update the package that brings the rule",
            )
        return kind(**kind.upgrade(given, version))

    @classmethod
    def upgrade(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields written by an older version, as this version names them."""
        return data


def _plain(value: Any) -> Any:
    """Lists become tuples and dtypes their names, so that equal rules compare equal after a round trip."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _written(value: Any, where: str) -> Any:
    if isinstance(value, Pattern):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_written(item, where) for item in value]
    if isinstance(value, dict):
        return {str(key): _written(item, where) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    what = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise RuleError(
        f"{where} can't be written", why=f"{what} is not data", fix="numbers, strings, lists and mappings are"
    )
