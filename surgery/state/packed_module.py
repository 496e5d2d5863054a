"""A quantised module that is a plain Linear for a while, and the records that bring its codes back to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import INTEGERS, Corrections, checksum
from surgery.errors import MergeError
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.transaction.undo_log import ABSENT

__all__ = ["CodeRecord", "PackedFold", "PlainModule", "become_plain", "without_bits"]

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_NOT_BACKENDS = {"torch", "builtins", "abc", "typing", "transformers", "surgery"}


@dataclass(eq=False)
class CodeRecord:
    """The former bits of one stored tensor: the differences from the new bits, or a copy if that is smaller."""

    after: int
    kept: Tensor | None = None
    differences: Corrections | None = None

    @staticmethod
    def of(old: Tensor, new: Tensor, copy: bool) -> CodeRecord:
        after, old = checksum(new), old.contiguous()
        if not copy and old.numel() and not old.is_complex():
            differences = Corrections()
            bits = [tensor.contiguous().flatten().view(INTEGERS[old.element_size()]) for tensor in (old, new)]
            differences.add(0, *bits)
            differences.close()
            if differences.nbytes < old.numel() * old.element_size():
                return CodeRecord(after, differences=differences)
        return CodeRecord(after, kept=old.clone())

    @property
    def nbytes(self) -> int:
        if self.differences is not None:
            return self.differences.nbytes
        return self.kept.numel() * self.kept.element_size() if self.kept is not None else 0

    def old(self, new: Tensor) -> Tensor:
        """The former tensor, from the present one."""
        if self.kept is not None:
            return self.kept.to(new.device)
        restored = new.detach().contiguous().clone()
        if self.differences is not None:
            self.differences.apply(restored.view(-1))
        return restored


@dataclass(eq=False)
class PlainModule:
    """What a module was before `become_plain`.

    Attributes:
        base: its class.
        attributes: the entries of its `__dict__` that a plain Linear does not have, or has with other values.
        names: the names of its `__dict__` in their order.
    """

    base: type[nn.Module]
    attributes: dict[str, Any]
    names: list[str]

    def restore(self, module: nn.Module) -> None:
        """Make the module again what it was. Hooks that came since stay."""
        now = dict(module.__dict__)
        for name in _HOOKS:
            if name in self.attributes and now.get(name) is not self.attributes[name]:
                self.attributes[name].update({k: v for k, v in now[name].items() if k not in self.attributes[name]})
        before = {name: self.attributes.get(name, now.get(name, ABSENT)) for name in self.names}
        added = {n: value for n, value in now.items() if n not in before and n not in _plain_names()}
        module.__dict__.clear()
        module.__dict__.update({n: value for n, value in before.items() if value is not ABSENT} | added)


@dataclass(eq=False)
class PackedFold:
    """The record of a merge into a packed weight.

    Attributes:
        layout: the layout of the packed weight, in words; the dtype of a plain Linear in its place.
        plain: the module as it was, if it is a plain Linear while merged.
        codes: the former codes and scales by name, if it stays quantised.
        others: the former values of tensors that are plain attributes of the module, by name.
        after: checksums of the plain module's tensors.
        norm: ‖ΔW‖.
        error: the norm of what the merge lost.
        outputs: the lost share of the change of the example's outputs; None without an example.
        entries: the number of entries of the weight.
        stored: the bytes of the packed weight.
    """

    layout: str
    plain: PlainModule | None = None
    codes: dict[str, CodeRecord] = field(default_factory=dict)
    others: dict[str, CodeRecord] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    norm: float | None = None
    error: float | None = None
    outputs: float | None = None
    entries: int = 0
    stored: int = 0

    @property
    def nbytes(self) -> int:
        return (
            self.stored
            if self.plain is not None
            else sum(record.nbytes for record in (*self.codes.values(), *self.others.values()))
        )

    @property
    def names(self) -> list[str]:
        """The names of the module's tensors that the merge changed."""
        return list(self.after) if self.plain is not None else ["weight", *self.others]

    def check(self, module: nn.Module, where: str) -> None:
        """Raise `MergeError` if a tensor changed since the merge. Changes nothing."""
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
            raise without_bits(where)
        if self.plain is not None:
            changed = [n for n, after in self.after.items() if checksum(module._parameters[n]) != after]  # type: ignore[arg-type]
        else:
            stored = _stored(module, where).tensors()
            # A backend may arrange its codes anew at a call; the tensors then have other names.
            same = stored.keys() == self.codes.keys()
            changed = [n for n, record in self.codes.items() if same and checksum(stored[n]) != record.after]
            changed += [n for n, record in self.others.items() if checksum(getattr(module, n)) != record.after]
        if changed:
            raise MergeError(
                "the base's weight changed since a rule folded into it",
                where=where,
                why=f"its {', '.join(changed)} was trained, loaded, or converted to another dtype in between",
                fix="restore those bits, or pass check=False to put the quantised weight back anyway",
            )

    def take_out(self, module: nn.Module, where: str) -> None:
        """Put the packed weight back to its bits."""
        if self.plain is not None:
            device = next(iter(module._parameters.values())).device  # type: ignore[union-attr]
            self.plain.restore(module)
            if (packed := packed_weight_of(module)) is not None and packed.device != device:
                module.to(device)
            return
        packed = _stored(module, where)
        for name, record in self.others.items():
            tensor = getattr(module, name)
            tensor.copy_(record.old(tensor))
        now = packed.tensors()
        same = now.keys() == self.codes.keys()
        if not same:
            packed.write(self._copies(where))
            return
        packed.write({name: record.old(now[name]) for name, record in self.codes.items()})

    def _copies(self, where: str) -> dict[str, Tensor]:
        kept = {name: record.kept for name, record in self.codes.items() if record.kept is not None}
        if len(kept) < len(self.codes):
            raise MergeError(
                "the quantised weight can't be put back",
                where=where,
                why="its backend arranged the codes anew since the merge, and the record holds differences alone",
                fix="load the base again, or merge with keep='copy'",
            )
        return kept


def without_bits(where: str) -> MergeError:
    """The error for a merged weight that went to the meta device."""
    return MergeError(
        "the site can't be unmerged",
        where=where,
        why="its merged weight is on the meta device, and so its bits are gone",
        fix="load the base again",
    )


def become_plain(module: nn.Module, packed: PackedWeight, dtype: torch.dtype) -> PlainModule:
    """Make a quantised module a plain Linear with the dequantised weight. Its hooks, children and flags stay."""
    base: type[nn.Module] = getattr(type(module), "_surgery_base", type(module))
    dense = packed.dequantise().to(dtype)
    out, inner = packed.shape
    bias: Any = module._parameters.get("bias", module._buffers.get("bias"))
    if bias is None and isinstance(module.__dict__.get("bias"), Tensor):
        bias = module.__dict__["bias"]
    new: Any = nn.Linear(inner, out, bias=bias is not None, device="meta")
    weight: Any = module._parameters.get("weight")
    new.weight = nn.Parameter(dense, requires_grad=bool(weight is not None and weight.requires_grad))
    if bias is not None:
        trains = isinstance(bias, nn.Parameter) and bias.requires_grad
        new.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=trains)
    before, fresh = dict(module.__dict__), new.__dict__
    owners = (*base.__mro__, type(weight), type(packed), type(module.__dict__.get("quantization_scheme")))
    packages = {cls.__module__.partition(".")[0] for cls in owners} - _NOT_BACKENDS
    after: dict[str, Any] = {}
    for name, value in before.items():
        if name in _HOOKS:
            hooks = {key: hook for key, hook in value.items() if not _is_of(getattr(hook, "hook", hook), packages)}
            after[name] = value if len(hooks) == len(value) else type(value)(hooks)
        elif name in ("_parameters", "_buffers", "in_features", "out_features"):
            after[name] = fresh[name]
        elif not _is_of(value, packages):
            after[name] = value
    after |= {name: fresh[name] for name in fresh if name not in after}
    attributes = {name: value for name, value in before.items() if after.get(name, ABSENT) is not value}
    module.__dict__.clear()
    module.__dict__.update(after)
    return PlainModule(base, attributes, list(before))


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


def _plain_names() -> set[str]:
    return set(nn.Linear(1, 1, device="meta").__dict__)


def _stored(module: nn.Module, where: str) -> PackedWeight:
    packed = packed_weight_of(module)
    if packed is None:
        raise MergeError(
            "the quantised weight of a merge is gone", where=where, why="the module is not quantised any more"
        )
    return packed
