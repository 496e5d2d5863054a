"""A module of the adapter's own in a rewrite: `mlp = site.submodule("mlp", make)`, and then `mlp(site.output)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery.authoring.module_skeleton import Skeleton, named_tensors
from surgery.errors import RuleError, SurgeryError, TraceError
from surgery.forward.own_forward import is_trusted
from surgery.forward.tape import Tape
from surgery.transaction.user_frames import line_of

__all__ = ["SiteModule"]

Make = Callable[[], nn.Module] | nn.Module


class Declaring(Protocol):
    """What a module's tensors are declared on, and its calls recorded: a `Site`."""

    tape: Tape
    specs: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def training(self) -> Tensor: ...
    def param(self, name: str, value: Any, init: Any = 0.0, *, dtype: Any = None, trainable: bool = True) -> Tensor: ...
    def buffer(self, name: str, value: Any, init: Any = 0.0, *, dtype: Any = None) -> Tensor: ...


class SiteModule:
    """A module whose tensors are the adapter's, as the author of a rule sees it; called with values.

    `tensors`: their values by the names that they have in the module.
    """

    def __init__(self, site: Declaring, skeleton: Skeleton, tensors: Mapping[str, Tensor]):
        self._site, self._skeleton = site, skeleton
        self._words = dict(tensors)
        self.tensors = {skeleton.words[word]: value for word, value in tensors.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these values, run as itself at each call of the site."""
        return self.called(args, kwargs)

    @property
    def kind(self) -> type[nn.Module]:
        """The module's class."""
        return type(self._skeleton.module)

    @property
    def floating(self) -> Tensor | None:
        """The first of its tensors that is floating-point: it computes in the dtype of this one."""
        return self._words[self._skeleton.floating] if self._skeleton.floating is not None else None

    @property
    def straight(self) -> bool:
        """Whether all forwards in it are straight-line code or torch's own: then a recording can't be a wrong one."""
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
        """A call with arguments that are known only at run time: `more` by position, `extra` by name, in mappings.

        Of `extra`, what the forward does not take, or what is None, is left out. `like`: what has the dtype of the
        result where no input is floating-point.
        """
        site = self._site
        further = () if isinstance(more, tuple) and not more and not extra and like is None else (more, extra, like)
        given = (self._words, site.training, args, dict(kwargs), *further)
        return site.tape.call("function", self._skeleton, given, {})

    def inlined(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, recorded as the operations of its forward rather than as one call of it.

        Raises `TraceError` with the line that can't be recorded; nothing of it stays recorded then.
        """
        tape = self._site.tape
        before = len(tape.steps)
        views = self._skeleton.views(self._words, self._site.training)
        try:
            output = views[-1].forward(*args, **kwargs)
            self._skeleton.check_unchanged(views)
        except Exception as error:
            del tape.steps[before:]
            told = error.what if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
            raise TraceError(
                f"{self.kind.__name__}.forward can't be held as operations",
                where=line_of(error, self.kind.forward),
                why=f"{told}: {error.why}" if isinstance(error, SurgeryError) and error.why else told,
                fix="call it as itself",
            ) from error
        return output


def site_module(
    site: Declaring,
    name: str,
    make: Make,
    trainable: bool | None = None,
    inherit: Mapping[str, Tensor] | None = None,
) -> SiteModule:
    """`Site.submodule`."""
    skeleton = skeleton_of(make)
    starts = _Starts(make)
    shapes = named_tensors(skeleton.module)

    def fill(tensor: Tensor, inner: str) -> None:
        own = (inherit or {}).get(inner)
        tensor.copy_(own if own is not None and own.shape == tensor.shape else starts.of(inner))

    held: dict[str, Tensor] = {}
    for word, inner in skeleton.words.items():
        tensor, start = shapes[inner], functools.partial(fill, inner=inner)
        dtype = site.dtype if tensor.is_floating_point() else tensor.dtype
        full = f"{name}_{word.lstrip('_')}" if name else word
        while full in site.specs:
            full = f"{full}_"
        if isinstance(tensor, nn.Parameter):
            trained = tensor.requires_grad if trainable is None else trainable
            trained = trained and (tensor.is_floating_point() or tensor.is_complex())
            held[word] = site.param(full, tensor.shape, start, dtype=dtype, trainable=trained)
        else:
            held[word] = site.buffer(full, tensor.shape, start, dtype=dtype)
    return SiteModule(site, skeleton, held)


class _Starts:
    """The values that tensors start with: each module that is made gives each of its tensors once.

    What is recorded at one site may be used for others like it (`Rule.alike`), which get values of their own.
    """

    def __init__(self, make: Make):
        self._make, self._left = make, dict[str, Tensor]()

    def of(self, name: str) -> Tensor:
        if name not in self._left:
            self._left = named_tensors(_made(self._make))
        return self._left.pop(name)


def skeleton_of(make: Make) -> Skeleton:
    """The skeleton of a module, or of what a factory makes: made on the meta device, without random numbers."""
    if isinstance(make, nn.Module):
        return Skeleton.of(make)
    try:
        with torch.device("meta"):
            made = _made(make)
    except SurgeryError:
        raise
    except Exception:  # it looks at numbers while it is made
        with torch.random.fork_rng(devices=[]):
            made = _made(make)
    return Skeleton.of(made)


def _made(make: Make) -> nn.Module:
    if isinstance(make, nn.Module):
        return make
    found = cast(Any, make)()
    if not isinstance(found, nn.Module):
        raise RuleError(
            f"{getattr(make, '__name__', make)} makes a {type(found).__name__}", fix="give what makes an nn.Module"
        )
    return found
