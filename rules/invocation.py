"""Finds an adapter's invocation in the texts of a call: the adapter acts from there on. Companion of LoraRule."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from surgery import Combination, Member, Rule, Share, Site, SiteError, SurgeryWarning, Targets, rule
from surgery.rules._shared import text_calls
from surgery.rules._virtual_tokens import text_inputs
from surgery.rules._virtual_tokens.past import CACHES, recurrent_layers
from surgery.rules.prompt_companions import THE_MODEL

T = TypeVar("T")

_MARK = "_surgery_invocations"


class Memory(NamedTuple):
    """What a cache remembers of one adapter.

    `begin`: the position where each row's invocation begins, -1 without one; `length`: how long the cache was then (-1:
    it does not count positions); `tail`: the last tokens of each row, in which an invocation may have begun.
    """

    begin: Tensor
    length: int
    tail: Tensor


@rule("invocation")
class InvocationRule(Rule):
    """Notes for each row of a call where its last invocation begins, for LoraRule's `invocation`. A companion.

    It is on the modules that take token ids. A cache carries from call to call which of its rows are invoked.
    """

    targets: Targets = field(default=THE_MODEL, kw_only=False)
    tokens: Sequence[int] = ()
    scalable = False
    why_not_merged = "which tokens it acts on depends on the text"

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return list(text_inputs.readers_of_ids(module, path))

    def check(self, module: nn.Module, path: str) -> str | None:
        if text_inputs.has_both(module):
            return "it has an encoder beside the decoder, and an invocation is for texts that a decoder continues"
        return None

    def rewrite(self, site: Site) -> Tensor:
        return _edited(site, [(site.adapter, site.mark, tuple(self.tokens), None)])

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        how.agree(shares)
        return self, {}

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> Tensor:
        rules = [cast(InvocationRule, site.rule) for site in sites]
        return _edited(
            sites[0],
            [(site.adapter, site.mark, tuple(rule.tokens), site.rows) for site, rule in zip(sites, rules, strict=True)],
        )


def _edited(site: Site, adapters: Sequence[tuple[str, str, tuple[int, ...], Any]]) -> Tensor:
    ids, rest = site.inputs["input_ids"], text_inputs.starred(site) or ""
    site.replace(ids, site.apply(begin_call, site.this, dict(site.inputs), rest, adapters))
    return site.apply(end_call, site.output, site.this, [name[:2] for name in adapters])


@text_calls.uncompiled
def begin_call(module: nn.Module, arguments: Mapping[str, Any], rest: str, adapters: Sequence[Any]) -> Tensor | None:
    """Notes a call with what each adapter acts on. Returns the ids.

    `adapters`: each one's name, mark, invocation and rows; rows are None if all rows of the call are the adapter's.
    """
    inputs = {**arguments, **(arguments[rest] if rest else {})}
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    text = embeds if ids is None else ids
    if text is None:
        return ids  # the forward raises its own error
    if torch.compiler.is_exporting():
        why = "an exported graph does not remember which rows were invoked in earlier calls"
        raise SiteError("an adapter with an invocation can't be exported", why=why)
    for adapter, mark, tokens, rows in adapters:
        if text_calls.is_inner(module, adapter):
            continue
        said = text_calls.said_last(text.shape[0], text.shape[1], text.device)
        if said is not None:
            cache, last, tail = cache_of(inputs), said, None
        elif ids is None:
            _warn("the call has inputs_embeds and no input_ids: no invocation can be found in it")
            cache, last, tail = None, torch.zeros(text.shape[0], dtype=torch.long, device=text.device), None
        else:
            cache, invocation = cache_of(inputs), torch.tensor(tokens, device=ids.device)
            last, tail = invoked_tokens(ids, invocation, memory_of(cache, mark, ids, len(tokens)))
        own = last if rows is None else last[rows.of(text.shape[0], last.device)]
        text_calls.begin(text_calls.TextCall(module, adapter, own, text.shape[1], (cache, last, tail)))
    return ids


@text_calls.uncompiled
def end_call(output: T, module: nn.Module, adapters: Sequence[Sequence[str]]) -> T:
    """Notes the end of a call, and in its caches which rows are invoked."""
    returned: Any = output.values() if isinstance(output, Mapping) else output if type(output) in (tuple, list) else ()
    for adapter, mark in adapters:
        call = text_calls.end(module, adapter, output)
        if call is None or call.memory[2] is None:
            continue
        given, last, tail = call.memory
        for cache in {id(item): item for item in (given, *returned) if hasattr(item, "get_seq_length")}.values():
            length = length_of(cache)
            begin = torch.where(last > 0, (length if length >= 0 else last) - last, -1)
            setattr(cache, _MARK, {**getattr(cache, _MARK, {}), mark: Memory(begin, length, tail)})
    return output


def invoked_tokens(ids: Tensor, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """Returns how many of the last tokens of each row are invoked, and the tokens to remember.

    The invocation itself is among them. A single token after others was generated, and begins no invocation.
    """
    if ids.dim() != 2:
        raise SiteError(f"no invocation can be found in ids of the shape {tuple(ids.shape)}", why="(rows, tokens)")
    size, new = len(tokens), ids.shape[1]
    tail = ids if memory is None else torch.cat([memory.tail, ids], 1)
    last = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if tail.shape[1] >= size and (memory is None or new > 1):
        found = (tail.unfold(1, size, 1) == tokens).all(-1)
        ends = torch.arange(tail.shape[1], size - 1, -1, device=ids.device)  # tokens from a place to the end
        last = torch.where(found, ends, tail.shape[1] + 1).amin(1)
        last = torch.where(last > tail.shape[1], 0, last).clamp(max=new)
    if memory is not None:
        last = torch.where((last == 0) & (memory.begin >= 0), new, last)
    return last, tail[:, max(0, tail.shape[1] - size + 1) :]


def memory_of(cache: Any, mark: str, ids: Tensor, size: int) -> Memory | None:
    """Returns what the cache of a call remembers of an adapter; None without a cache, or with an empty one."""
    if cache is None:
        return None
    if not hasattr(cache, "get_seq_length"):
        why, fix = f"its cache is a {type(cache).__name__}", "one that tells its length: get_seq_length()"
        raise SiteError("it can't be told which rows of the call were invoked before", why=why, fix=fix)
    length = length_of(cache)
    if length == 0 or length < 0 and not cache.has_previous_state():
        return None
    unknown = Memory(ids.new_full((len(ids),), -1), length, ids[:, :0])
    memory: Memory = getattr(cache, _MARK, {}).get(mark, unknown)
    begin, tail = memory.begin, memory.tail
    if len(begin) != len(ids):  # rows that were repeated since
        if len(ids) % len(begin):
            why = f"it has {len(begin)} rows, and the call has {len(ids)}"
            raise SiteError("it can't be told which rows of the cache were invoked", why=why)
        begin, tail = (value.repeat_interleave(len(ids) // len(begin), 0) for value in (begin, tail))
    if length != memory.length:  # it was cropped, or filled without the adapter
        begin = torch.where(begin + size <= length, begin, -1) if length >= 0 else begin
        tail = ids[:, :0]
    return Memory(begin, length, tail)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def length_of(cache: Any) -> int:
    """Returns the number of positions in a cache; -1 if it has only states, which do not count them."""
    recurrent = recurrent_layers(cache)
    return -1 if recurrent and all(recurrent) else int(cache.get_seq_length())


@text_calls.uncompiled
def within_invocation(branch: Tensor, module: nn.Module, adapter: str) -> Tensor:
    """Returns what an adapter adds, with zeros on tokens that it does not act on."""
    call = text_calls.running(module, adapter)
    if call is None and branch.dim() > 2:  # of a model that does not take token ids
        last = text_calls.said_last(branch.shape[0], branch.shape[1], branch.device)
        call = None if last is None else text_calls.TextCall(module, adapter, last, branch.shape[1])
    if call is None:
        _warn("a module is called outside of its model: the text is unknown")
        return branch.masked_fill(torch.ones_like(branch, dtype=torch.bool), 0)
    return branch.masked_fill(~call.acts_on(branch), 0)


def _warn(what: str) -> None:
    warnings.warn(f"{what}; an adapter with an invocation is off there", SurgeryWarning, stacklevel=3)
