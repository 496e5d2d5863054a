"""A quantised module that is plain for a while, and the records that bring its codes back to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import checksum
from surgery.errors import MergeError
from surgery.packed.packed_map import packed_by_name, stored_in
from surgery.packed.plain_module import plain_module
from surgery.state.kept_codes import CodeRecord, KeptCodes
from surgery.transaction.undo_log import ABSENT, Journal

__all__ = ["ChangeLoss", "CodeRecord", "PackedFold", "PlainModule", "become_plain", "without_bits"]

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_NOT_BACKENDS = {"torch", "builtins", "abc", "typing", "transformers", "surgery"}


@dataclass(eq=False)
class PlainModule:
    """What a module was before `become_plain`.

    Attributes:
        base: its class.
        attributes: the entries of its `__dict__` that the plain module does not have, or has with other values.
        names: the names of its `__dict__` in their order.
        plain: the class of the plain module.
        introduced: the names that only the plain module has.
        tensors: the names of the plain module's own tensors.
        users: the names of the user's tensors, which both modules have.
    """

    base: type[nn.Module]
    attributes: dict[str, Any]
    names: list[str]
    plain: type[nn.Module] = nn.Linear
    introduced: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset({"weight", "bias"})
    users: frozenset[str] = frozenset()

    def restore(self, module: nn.Module) -> None:
        """Make the module again what it was. Hooks that came since stay, and what the user did to other tensors."""
        now = dict(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            former = self.attributes[kind]
            for name in self.users:
                former.pop(name, None)
            former.update({name: tensor for name, tensor in now[kind].items() if name not in self.tensors})
        for name in _HOOKS:
            if name in self.attributes and now.get(name) is not self.attributes[name]:
                self.attributes[name].update({k: v for k, v in now[name].items() if k not in self.attributes[name]})
        before = {name: self.attributes.get(name, now.get(name, ABSENT)) for name in self.names}
        added = {name: value for name, value in now.items() if name not in before and name not in self.introduced}
        module.__dict__.clear()
        module.__dict__.update({n: value for n, value in before.items() if value is not ABSENT} | added)


class ChangeLoss(NamedTuple):
    """What a merge lost of the change of one packed weight: ‖ΔW‖, the norm of the loss, the lost share of outputs."""

    norm: float
    error: float
    outputs: float | None = None


@dataclass(eq=False)
class PackedFold:
    """The record of a merge into the packed weights of a module.

    Attributes:
        layout: the layout of the packed weights, in words; the dtype of a plain module in their place.
        plain: the module as it was, if it is plain while merged.
        codes: the former codes and scales, if it stays quantised.
        others: the former values of tensors that are plain attributes of the module, by name.
        after: checksums of the plain module's tensors.
        losses: what the merge lost of each weight's change, by name.
        entries: the number of entries of the weights.
        stored: the bytes of the packed weights.
    """

    layout: str
    plain: PlainModule | None = None
    codes: KeptCodes = field(default_factory=KeptCodes)
    others: dict[str, CodeRecord] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    losses: dict[str, ChangeLoss] = field(default_factory=dict)
    entries: int = 0
    stored: int = 0

    @property
    def share(self) -> float:
        """What was lost, as a share of ‖ΔW‖ of all weights of the module."""
        norm = math.hypot(*(loss.norm for loss in self.losses.values()))
        return math.hypot(*(loss.error for loss in self.losses.values())) / norm if norm else 0.0

    @property
    def nbytes(self) -> int:
        if self.plain is not None:
            return self.stored
        return self.codes.nbytes + sum(record.nbytes for record in self.others.values())

    @property
    def names(self) -> list[str]:
        """The names of the module's tensors that the merge changed."""
        return list(self.after) if self.plain is not None else [*self.losses, *self.others]

    def check(self, module: nn.Module, where: str) -> None:
        """Raise `MergeError` if a tensor changed since the merge. Changes nothing."""
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
            raise without_bits(where)
        if self.plain is not None:
            changed = [n for n, after in self.after.items() if checksum(module._parameters[n]) != after]  # type: ignore[arg-type]
        else:
            changed = self.codes.changed(module, where)
            changed += [n for n, record in self.others.items() if checksum(getattr(module, n)) != record.after]
        if changed:
            raise MergeError(
                "the base's weight changed since a rule folded into it",
                where=where,
                why=f"its {', '.join(changed)} was trained, loaded, or converted to another dtype in between",
                fix="restore those bits, or pass check=False to put the quantised weight back anyway",
            )

    def take_out(self, module: nn.Module, journal: Journal, where: str) -> None:
        """Put the packed weights back to their bits. The caller has noted a plain module."""
        if self.plain is not None:
            device = next(iter(module._parameters.values())).device  # type: ignore[union-attr]
            self.plain.restore(module)
            if any(packed.device != device for packed in packed_by_name(module).values()):
                module.to(device)
            return
        for name, record in self.others.items():
            tensor = getattr(module, name)
            journal.undo(tensor.copy_, tensor.detach().clone())
            tensor.copy_(record.old(tensor))
        self.codes.take_out(module, journal, where)


def without_bits(where: str) -> MergeError:
    """The error for a merged weight that went to the meta device."""
    return MergeError(
        "the site can't be unmerged",
        where=where,
        why="its merged weight is on the meta device, and so its bits are gone",
        fix="load the base again",
    )


def become_plain(
    module: nn.Module, dtype: torch.dtype, *, in_any_dtype: bool = False, config: Any = None
) -> PlainModule:
    """Give a quantised module the attributes and dequantised tensors of its plain form. The caller sets its class.

    Hooks, children and flags stay, and tensors that the user gave to the module.

    Args:
        module: the quantised module.
        dtype: the dtype of the plain tensors.
        in_any_dtype: whether a plain Linear computes in the dtype of its input.
        config: the model's configuration, which experts of the same architecture use.
    """
    base: type[nn.Module] = getattr(type(module), "_surgery_base", type(module))
    parts = packed_by_name(module)
    new = plain_module(module, dtype, in_any_dtype=in_any_dtype)
    own, users = module._parameters, set[str]()
    tensors = frozenset(
        name for name, tensor in new._parameters.items() if tensor is None or tensor is not own.get(name)
    )
    if config is not None and type(new.__dict__.get("config")) is type(config):
        new.__dict__["config"] = config
    stored = {*stored_in(module), *parts, "weight", "bias"}.union(*(packed.auxiliary for packed in parts.values()))
    for kind in ("_parameters", "_buffers"):
        mine = {n: tensor for n, tensor in getattr(module, kind).items() if n not in stored and n not in tensors}
        new.__dict__[kind].update(mine)
        users.update(mine)
    before, fresh = dict(module.__dict__), new.__dict__
    weight, scheme = module._parameters.get("weight"), module.__dict__.get("quantization_scheme")
    owners = (*base.__mro__, type(weight), *map(type, parts.values()), type(scheme))
    packages = {cls.__module__.partition(".")[0] for cls in owners} - _NOT_BACKENDS
    after: dict[str, Any] = {}
    for name, value in before.items():
        if name in _HOOKS:
            hooks = {key: hook for key, hook in value.items() if not _is_of(getattr(hook, "hook", hook), packages)}
            after[name] = value if len(hooks) == len(value) else type(value)(hooks)
        elif name in ("_parameters", "_buffers", "in_features", "out_features"):
            after[name] = fresh[name] if name in fresh else value
        elif name not in stored and not _is_of(value, packages):
            after[name] = value
    introduced = frozenset(fresh.keys() - before.keys())
    after |= {name: fresh[name] for name in introduced}
    attributes = {name: value for name, value in before.items() if after.get(name, ABSENT) is not value}
    module.__dict__.clear()
    module.__dict__.update(after)
    return PlainModule(base, attributes, list(before), type(new), introduced, tensors, frozenset(users))


def _is_of(value: Any, packages: set[str]) -> bool:
    """Whether an attribute belongs to a backend: an object or a function of its, or tensors."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(isinstance(item, Tensor) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Tensor) for item in value)
    function = getattr(value, "__func__", value)
    module = getattr(function, "__globals__", {}).get("__name__") or type(value).__module__
    return str(module).partition(".")[0] in packages
