"""Activations out of a model by name: recorded while a context is open, and at no other time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from surgery import Rule, Site, SurgeryError, hidden_of, rule


@rule("capture")
class CaptureRule(Rule):
    """Lets `captured(model)` record what a module takes or returns. The output is the same to the bit.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import CaptureRule, captured
    >>> model = apply_rules(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [CaptureRule("0")])
    >>> with captured(model) as found:
    ...     output = model(torch.ones(1, 3))
    >>> torch.equal(found["0"][0].relu(), output)
    True

    Goes on any module. `what`: "output" (the hidden state it returns), "input" (its first input) or "result" (all
    that it returns, such as a tuple with attention maps); `tag`: the name it is found under, by default the module's
    path. Without an open context a call looks at one flag.
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
            site.replace(site.input, site.apply(_noted, site.input, site.this, self.tag, "output"))
            return None
        return site.apply(_noted, site.output, site.this, self.tag, self.what)


class Captured(dict[str, list[Any]]):
    """What a context recorded: a list for each name, one item a call."""

    def __missing__(self, name: str) -> list[Any]:
        raise SurgeryError(
            f"nothing was captured under {name!r}",
            why=f"there is {', '.join(self) or 'nothing'}: no module with a CaptureRule of that name was called",
            fix="call the model inside the context, in the same thread; an exported program captures nothing",
        )


@contextmanager
def captured(model: nn.Module, *, detach: bool = True) -> Iterator[Captured]:
    """Record the model's captured activations while the context is open: name → a list, one item a call.

    The tensors are copies, on their device; `detach=False` keeps their gradients' history. Only calls of this model,
    in this thread (or asyncio task), are recorded; contexts may be open in several threads, or inside each other.
    Nothing is held here once the context is closed. A compiled model is compiled again without this site being fused
    (a graph break; `fullgraph=True` is an error of torch). Gradient checkpointing runs layers twice, which shows.
    """
    global _listening, _record
    paths = {id(module): path for path, module in model.named_modules()}
    found = Captured()
    with _lock:
        _record = _undisturbed()
        _listening += 1
    token = _open.set((*_open.get(), _Context(paths, found, detach)))
    try:
        yield found
    finally:
        _open.reset(token)
        with _lock:
            _listening -= 1


@dataclass(frozen=True)
class _Context:
    paths: dict[int, str]
    found: Captured
    detach: bool


_open: ContextVar[tuple[_Context, ...]] = ContextVar("captured", default=())
_listening = 0  # contexts open in any thread: the one thing that is looked at where none is
_lock = threading.Lock()


def _noted(value: Any, module: nn.Module, tag: str | None, what: str) -> Any:
    if _listening:
        _record(value, module, tag, what)
    return value


def _take(value: Any, module: nn.Module, tag: str | None, what: str) -> None:
    for context in _open.get():
        path = context.paths.get(id(module))
        if path is not None:
            kept = value if what == "result" else hidden_of(value)
            copy = tree_map_only(Tensor, lambda t: (t.detach() if context.detach else t).clone(), kept)  # noqa: B023
            context.found.setdefault(path if tag is None else tag, []).append(copy)


_record: Callable[..., None] = _take


@functools.cache
def _undisturbed() -> Any:
    return torch.compiler.disable(_take)  # imports torch's compiler, a second: only once something is captured
