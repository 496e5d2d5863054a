"""`SiteModule`: a module of the adapter in a rewrite: `mlp = site.submodule("mlp", make)`, then `mlp(site.output)`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery.authoring.module_skeleton import Skeleton, tensor_words
from surgery.authoring.skeleton_parts import fill_tensors, named_tensors
from surgery.errors import RuleError, SurgeryError, TraceError
from surgery.forward.own_forward import is_trusted
from surgery.forward.tape import Tape
from surgery.transaction.user_frames import line_of

__all__ = ["Make", "SiteModule", "filled_module"]

Make = Callable[[], nn.Module] | nn.Module


class Declaring(Protocol):
    """The part of a `Site` that a `SiteModule` uses: it declares tensors and records calls."""

    tape: Tape
    specs: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def training(self) -> Tensor: ...
    def param(self, name: str, value: Any, init: Any = 0.0, *, dtype: Any = None, trainable: bool = True) -> Tensor: ...
    def buffer(self, name: str, value: Any, init: Any = 0.0, *, dtype: Any = None) -> Tensor: ...


class SiteModule:
    """A module whose tensors belong to the adapter. A rule calls it with values. Made by `Site.submodule`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import Rule, apply_rules, rule
    >>> @rule("doc-side")
    ... class SideRule(Rule):
    ...     def rewrite(self, site):
    ...         side = site.submodule("side", lambda: nn.Linear(site.in_features, site.out_features))
    ...         return site.output + side(site.input)
    >>> model = apply_rules(nn.Linear(3, 2), SideRule(nn.Linear))
    >>> sorted(name for name, _ in model.adapters.default.named_parameters())
    ['side_bias', 'side_weight']

    Attributes:
        tensors: The values of its tensors, by their names in the module.
    """

    def __init__(self, site: Declaring, skeleton: Skeleton, tensors: Mapping[str, Tensor]):
        self._site, self._skeleton = site, skeleton
        self._words = dict(tensors)
        self.tensors = {skeleton.words[word]: value for word, value in tensors.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with values. It runs as a normal module at each call of the site."""
        return self.called(args, kwargs)

    @property
    def kind(self) -> type[nn.Module]:
        """The module's class."""
        return type(self._skeleton.module)

    @property
    def floating(self) -> Tensor | None:
        """Its first floating-point tensor, whose dtype it computes in; None if it has no such tensor."""
        return self._words[self._skeleton.floating] if self._skeleton.floating is not None else None

    @property
    def straight(self) -> bool:
        """Whether all its forwards are straight-line code or torch's own, so that a recording is always right."""
        kinds = [type(inner) for inner in self._skeleton.module.modules()]
        return all(is_trusted(kind) and not issubclass(kind, nn.Embedding) for kind in kinds)

    def called(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        more: Any = (),
        extra: tuple[Any, ...] = (),
        like: Tensor | None = None,
    ) -> Any:
        """Call the module with arguments that are known only at run time.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            more: A value that is a tuple of further positional arguments.
            extra: Mappings of further keyword arguments. None and names that the forward does not take are dropped.
            like: A value whose dtype the result gets if no input is floating-point.
        """
        site = self._site
        further = () if isinstance(more, tuple) and not more and not extra and like is None else (more, extra, like)
        arguments = (self._words, site.training, args, dict(kwargs), *further)
        return site.tape.call("function", self._skeleton, arguments, {})

    def inlined(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module and record the operations of its forward, instead of one call.

        Raises:
            TraceError: A line of the forward can't be recorded. The recording is then undone.
        """
        tape = self._site.tape
        before = len(tape.steps)
        try:
            views = self._skeleton.views(self._words, self._site.training)
            output = views[-1].forward(*args, **kwargs)
            self._skeleton.check_unchanged(views)
        except Exception as error:
            del tape.steps[before:]
            why = error.what if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
            raise TraceError(
                f"{self.kind.__name__}.forward can't be recorded as operations",
                where=line_of(error, self.kind.forward),
                why=f"{why}: {error.why}" if isinstance(error, SurgeryError) and error.why else why,
                fix="call the module instead of inlining it",
            ) from error
        return output


def site_module(
    site: Declaring,
    name: str,
    make: Make,
    trainable: bool | None = None,
    inherit: Mapping[str, Tensor] | None = None,
) -> SiteModule:
    """Implements `Site.submodule`."""
    skeleton = skeleton_of(make)
    starts = _Starts(make)
    shapes = named_tensors(skeleton.module)

    def fill(tensor: Tensor, inner: str) -> None:
        own = (inherit or {}).get(inner)
        tensor.copy_(own if own is not None and own.shape == tensor.shape else starts.of(inner))

    values: dict[str, Tensor] = {}
    for word, inner in skeleton.words.items():
        tensor, start = shapes[inner], functools.partial(fill, inner=inner)
        dtype = site.dtype if tensor.is_floating_point() else tensor.dtype
        full = f"{name}_{word.lstrip('_')}" if name else word
        while full in site.specs:
            full = f"{full}_"
        if isinstance(tensor, nn.Parameter):
            trained = tensor.requires_grad if trainable is None else trainable
            trained = trained and (tensor.is_floating_point() or tensor.is_complex())
            values[word] = site.param(full, tensor.shape, start, dtype=dtype, trainable=trained)
        else:
            values[word] = site.buffer(full, tensor.shape, start, dtype=dtype)
    return SiteModule(site, skeleton, values)


def filled_module(name: str, make: Make, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Returns the module of `Site.submodule(name, make)` with an adapter's tensors, which stay the same objects."""
    with torch.random.fork_rng(devices=[]):
        module = copy.deepcopy(make) if isinstance(make, nn.Module) else _create(make)
    start = named_tensors(module)
    words = {inner: word for word, inner in tensor_words(start).items()}
    filled = {id(t): tensors[f"{name}_{words[i].lstrip('_')}" if name else words[i]] for i, t in start.items()}
    fill_tensors(module, filled)
    return module


class _Starts:
    """The initial values of tensors. Each created module provides each of its tensors once.

    Sites like this one may share its recording (`Rule.alike`), but each site gets its own initial values.
    """

    def __init__(self, make: Make):
        self._make, self._tensors = make, dict[str, Tensor]()

    def of(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors = named_tensors(_create(self._make))
        return self._tensors.pop(name)


def skeleton_of(make: Make) -> Skeleton:
    """Returns the skeleton of a module or of a factory's module, created on the meta device without random numbers."""
    if isinstance(make, nn.Module):
        return Skeleton.of(make)
    try:
        with torch.device("meta"):
            module = _create(make)
    except SurgeryError:
        raise
    except Exception:  # its constructor reads numbers
        with torch.random.fork_rng(devices=[]):
            module = _create(make)
    return Skeleton.of(module)


def _create(make: Make) -> nn.Module:
    if isinstance(make, nn.Module):
        return make
    module = cast(Any, make)()
    if not isinstance(module, nn.Module):
        raise RuleError(
            f"{getattr(make, '__name__', make)} returns a {type(module).__name__}",
            fix="pass a function that returns an nn.Module",
        )
    return module
