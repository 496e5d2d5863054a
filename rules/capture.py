"""Activations of named modules, recorded only while a context is open."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from surgery import Rule, Site, SurgeryError, hidden_of, rule

T = TypeVar("T")


@rule("capture")
class CaptureRule(Rule):
    """Lets `captured(model)` record what a module takes or returns; the output keeps its bits.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import CaptureRule, captured
    >>> model = apply_rules(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [CaptureRule("0")])
    >>> with captured(model) as found:
    ...     output = model(torch.ones(1, 3))
    >>> torch.equal(found["0"][0].relu(), output)
    True

    Works on any module. Without an open context a call checks one flag and nothing else. It can't be merged: it changes
    nothing.

    Args:
        what: "output" (default: the hidden state that the module returns), "input" (its first input) or "result" (all
            that it returns, such as a tuple with attention maps).
        tag: the name of the record; default None: the module's path.

    Raises:
        RuleError: a field is out of range.
    """

    what: Literal["output", "input", "result"] = "output"
    tag: str | None = None

    identity = True
    why_not_merged = "it changes nothing, so there is nothing to merge"

    def validate(self) -> None:
        if self.what not in ("output", "input", "result"):
            raise self.bad("what", "'output', 'input' or 'result'")
        if not isinstance(self.tag, (str, type(None))):
            raise self.bad("tag", "a name")

    def rewrite(self, site: Site) -> Tensor | None:
        if self.what == "input":
            site.replace(site.input, site.apply(record_value, site.input, site.this, self.tag, "output"))
            return None
        return site.apply(record_value, site.output, site.this, self.tag, self.what)


class Captured(dict[str, list[Any]]):
    """The record of a context: name → list with one item per call.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import CaptureRule, captured
    >>> model = apply_rules(nn.Sequential(nn.Linear(3, 2)), [CaptureRule("0", tag="hidden")])
    >>> with captured(model) as found:
    ...     _ = model(torch.ones(1, 3)), model(torch.ones(4, 3))
    >>> [tuple(hidden.shape) for hidden in found["hidden"]]
    [(1, 2), (4, 2)]

    Raises:
        SurgeryError: nothing was captured under the name.
    """

    def __missing__(self, name: str) -> list[Any]:
        raise SurgeryError(
            f"nothing was captured under {name!r}",
            why=f"there is {', '.join(self) or 'nothing'}: no module with a CaptureRule of that name was called",
            fix="call the model inside the context, in the same thread; an exported program captures nothing",
        )


@contextmanager
def captured(model: nn.Module, *, detach: bool = True) -> Iterator[Captured]:
    """Record the activations of a model's CaptureRules while the context is open.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import CaptureRule, captured
    >>> model = apply_rules(nn.Sequential(nn.Linear(3, 2)), [CaptureRule("0")])
    >>> with captured(model, detach=False) as found:
    ...     _ = model(torch.ones(1, 3))
    >>> found["0"][0].requires_grad
    True

    Args:
        model: a model with CaptureRules.
        detach: whether the recorded tensors are cut off from the autograd graph; default True.

    Yields:
        A `Captured`: name → list of copies on their device, one item per call.

    Notes:
        Only calls of this model in this thread (or asyncio task) are recorded. Contexts may be open in several threads,
        or nested. The library keeps nothing after the context closes. Under `torch.compile`, an open context breaks the
        graph at the site; with `fullgraph=True` torch raises an error. Gradient checkpointing runs layers twice, so it
        records twice.
    """
    global _listening, _record
    paths = {id(module): path for path, module in model.named_modules()}
    record = Captured()
    with _lock:
        _record = _uncompiled_take()
        _listening += 1
    token = _open.set((*_open.get(), _Context(paths, record, detach)))
    try:
        yield record
    finally:
        _open.reset(token)
        with _lock:
            _listening -= 1


@dataclass(frozen=True)
class _Context:
    paths: dict[int, str]
    record: Captured
    detach: bool


_open: ContextVar[tuple[_Context, ...]] = ContextVar("captured", default=())
_listening = 0  # contexts open in any thread: the one thing that is looked at where none is
_lock = threading.Lock()


def record_value(value: T, module: nn.Module, tag: str | None, what: str) -> T:
    """Returns the value, and records it in the contexts of `captured` that are open."""
    if _listening:
        _record(value, module, tag, what)
    return value


def _take(value: Any, module: nn.Module, tag: str | None, what: str) -> None:
    for context in _open.get():
        path = context.paths.get(id(module))
        if path is not None:
            values = value if what == "result" else hidden_of(value)
            copy = tree_map_only(Tensor, lambda t: (t.detach() if context.detach else t).clone(), values)  # noqa: B023
            context.record.setdefault(path if tag is None else tag, []).append(copy)


_record: Callable[..., None] = _take


@functools.cache
def _uncompiled_take() -> Any:
    return torch.compiler.disable(_take)  # imports torch's compiler, a second: only once something is captured
