"""The interface of packed weights, and the register of the classes that implement it."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from typing import ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.packed.affine_codes import AffineCodes
from surgery.packed.packed_tensors import PackedTensors

__all__ = [
    "BACKENDS",
    "PackedWeight",
    "class_names",
    "dequantised_weight",
    "packed_weight_of",
    "plain_view",
    "register_packed",
]

W = TypeVar("W", bound="type[PackedWeight]")

# The file of a backend by the name of a class, or by the package that defines a class, of a module, of its weight
# or of its scheme.
# A file is imported when a model has such a class, and imports the backend's package then.
BACKENDS: dict[str, str] = {
    name: f"surgery.packed.{file}"
    for file, names in {
        "bitsandbytes": ("bitsandbytes",),
        "torchao": ("torchao",),
        "torchao_int4": ("Int4Tensor",),
        "gptq": ("auto_gptq", "QuantLinear", "TorchLinear", "TorchQuantLinear", "PackableQuantLinear"),
        "awq": ("awq", "WQLinear_GEMM", "AwqTorchLinear", "AWQuantLinear"),
        "aten_int4": ("TorchAtenLinear", "TorchAtenAwqLinear"),
        "hqq": ("HQQLinear",),
        "quanto": ("optimum",),
        "compressed_tensors": ("compressed_tensors",),
        "fp8": ("FP8Linear", "CompressedTensorsFP8Linear", "FbgemmFp8Linear"),
    }.items()
    for name in names
}
_registered: list[type[PackedWeight]] = []


class PackedWeight(PackedTensors):
    """The packed weight of one module, such as the 4-bit weight of bitsandbytes' `Linear4bit`.

    An object of this class reads the module each time; it does not keep tensors. A subclass implements one backend, and
    `register_packed` makes it known.

    Attributes:
        backend: the name of the backend, such as "bitsandbytes".
        module: the quantised module.
        auxiliary: names of further tensors of the module that are the backend's, beside those in `tensors`. While the
            module is a plain Linear, it does not have them. Tensors of other names are the user's, and stay.
        rearranges: whether a call of the module may arrange its codes anew, under other names in `tensors`.
    """

    rearranges: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether the class can read this module. It looks at names of classes and does not import the backend."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The sizes of the dequantised weight, (out, in)."""

    @property
    def bias(self) -> Tensor | None:
        """The bias that the module's forward adds, whether it is a parameter, a buffer or an attribute."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def is_plain_map(self) -> bool:
        """Whether the module's forward is torch's or a library's own, and so W x + b; not that of a user's subclass."""
        base = getattr(type(self.module), "_surgery_base", type(self.module))
        names = {"torch", "gptqmodel", *BACKENDS, type(self).__module__.partition(".")[0]}
        for cls in base.__mro__:
            if cls.__name__ in names or cls.__module__.partition(".")[0] in names:
                return True
            if "forward" in vars(cls):
                return False
        return False

    @property
    def activations(self) -> str | None:
        """How the module quantises its input in evaluation, such as "int8, one scale for each row"; None if not.

        The dequantised weight is exact also then. The module's output differs from the plain map by the rounding of the
        input.
        """
        return None

    @property
    def passes_gradient(self) -> bool:
        """Whether the module's forward passes a gradient on to its input."""
        return True

    @abstractmethod
    def dequantise(self) -> Tensor:
        """A new plain tensor (out, in): the values that the module's own forward multiplies with."""

    @abstractmethod
    def requantise(self, weight: Tensor, *, scales: Literal["refit", "keep"] = "refit") -> dict[str, Tensor]:
        """Quantises a plain weight (out, in) in this layout, with the same settings. Changes nothing.

        Args:
            weight: the new values.
            scales: "refit" computes scales and zero points from the new values, as the backend does. "keep" uses those
                that are there.

        Returns:
            New tensors by the names of `tensors`, for `write`.
        """

    def affine(self) -> AffineCodes | None:
        """The codes as integers with scales and zero points; None if the values are not of this form (nf4, float8)."""
        return None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The module's map with a plain weight (out, in) in place of its own, in the dtype of `x`."""
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def register_packed(cls: W) -> W:
    """Makes a class of packed weights known to the engine. Use it as a decorator.

    The engine asks the class registered last first, so a class of yours goes before those that the engine brings.

    Args:
        cls: a subclass of `PackedWeight` with `accepts`, `layout`, `shape`, `dtype`, `tensors`, `dequantise` and
            `requantise`.

    Returns:
        The class itself.
    """
    _registered.insert(len(_registered) if cls.__module__ in BACKENDS.values() else 0, cls)
    return cls


def plain_view(tensor: Tensor) -> Tensor:
    """The numbers of a tensor subclass or parameter as a plain tensor of the same memory, with the same version."""
    return tensor.detach().as_subclass(Tensor)


def class_names(module: nn.Module) -> set[str]:
    """The full names of a module's class and its base classes, without the class that the engine generated."""
    base = getattr(type(module), "_surgery_base", type(module))
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in base.__mro__}


def packed_weight_of(module: nn.Module) -> PackedWeight | None:
    """The packed weight of a module; None for a module that is not quantised, or in a layout that is not known.

    >>> from torch import nn
    >>> from surgery import packed_weight_of
    >>> packed_weight_of(nn.Linear(2, 2)) is None
    True

    Args:
        module: the module, with or without adapters.
    """
    base = getattr(type(module), "_surgery_base", type(module))
    weight = module._parameters["weight"] if "weight" in module._parameters else None
    scheme = module.__dict__.get("quantization_scheme")  # compressed-tensors' mark of an ordinary Linear
    files = _files_of(base) | _files_of(type(weight)) | _files_of(type(scheme))
    for file in files:
        import_module(file)
    for cls in _registered:
        if (cls.__module__ in files or cls.__module__ not in BACKENDS.values()) and cls.accepts(module):
            return cls(module)
    return None


def _files_of(cls: type) -> frozenset[str]:
    """The files of backends that may know a class of modules or weights."""
    if cls not in _files:
        names = {name for base in cls.__mro__ for name in (base.__name__, base.__module__.partition(".")[0])}
        _files[cls] = frozenset(BACKENDS[name] for name in names & BACKENDS.keys())
    return _files[cls]


_files: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def dequantised_weight(module: nn.Module) -> Tensor:
    """The dequantised weight of a quantised module: what graphs of rewritten forwards read as the weight."""
    packed = packed_weight_of(module)
    if packed is None:
        raise SiteError(
            f"the weight of this {type(module).__name__} can't be read",
            why="a rule reads the dequantised weight, and the module is not quantised any more",
            fix="remove the adapter, and put it on again",
        )
    with torch.no_grad():
        return packed.dequantise()
