"""Continues texts with an exported decoder, with or without a cache among its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.runtime.dtypes import array_of_value, dtype_of, value_of, widened
from surgery.onnx.runtime.feeds import Feeds, Input
from surgery.onnx.runtime.manifest import Manifest
from surgery.onnx.runtime.sampling import Pick

__all__ = ["Decoder", "RunnableFile"]

IDS, MASK, POSITIONS, PLACES, LOGITS = "input_ids", "attention_mask", "position_ids", "cache_position", "logits"


class RunnableFile(Protocol):
    """The part of `OnnxRunner` that `Decoder` uses. A protocol, because the runner imports this module."""

    path: Path
    session: Any
    manifest: Manifest
    feeds: Feeds
    takes_padding: bool

    def run_values(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]: ...


@dataclass
class Texts:
    """The texts so far and the cache. Arrays are (batch, positions); the file has read the first `read` positions."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    past: dict[str, Any] = field(default_factory=dict)  # OrtValues; none before the first step
    further: dict[str, Any] = field(default_factory=dict)  # inputs that are the same at each step
    read: int = 0


class Decoder:
    """Generates with a runner's file. All calls use the same slot values."""

    def __init__(self, runner: RunnableFile, slot_values: Mapping[str, Any]):
        self.runner, self.slot_values = runner, slot_values
        self.inputs: dict[str, Input] = {**runner.feeds.optional, **runner.feeds.required}
        self.cache = {entry["past"]: entry["present"] for entry in runner.manifest.cache}
        ids = self.inputs.get(IDS)
        if ids is None or len(ids.shape) != 2 or LOGITS not in runner.manifest.outputs:
            why = f"it takes {runner.feeds}, and returns {', '.join(runner.manifest.outputs[:4])}"
            raise SurgeryError(
                f"{runner.path.name} is not a decoder: it needs the input {IDS} and the output {LOGITS}", why=why
            )
        if isinstance(ids.shape[1], int):
            why = f"it accepts exactly {ids.shape[1]} positions"
            fix = "export it with dynamic=True; the notices of the export name sizes that tracing fixed"
            raise SurgeryError("texts can't be continued with this file", why=why, fix=fix)
        if mask := self.inputs.get(MASK):
            _require(len(mask.shape) == 2, f"its {MASK} is not of the shape (batch, positions)")
        _require(set(self.cache) <= set(self.inputs), "it lacks inputs of the cache that its manifest lists")
        generation = runner.manifest.further.get("generation") or {}
        self.reread = generation.get("reread")  # the length at which transformers drops the cache
        if differs := generation.get("differs"):
            fix = "use runner.run, and make the inputs of each step yourself"
            raise SurgeryError("this file can't continue texts as the model's generate does", why=differs, fix=fix)
        encoder_inputs = [name for name in self.cache if ".encoder." in name]
        _require(not encoder_inputs, "it is the decoder of an encoder-decoder, whose cache holds an encoder's output")

    # The start ------------------------------------------------------------------------------------------------

    def start(self, inputs: Any) -> Texts:
        """Checks the inputs, and makes the mask and the positions if the file takes them and the caller gives none."""
        arrays = dict(inputs) if isinstance(inputs, Mapping) else {IDS: inputs}
        if IDS not in arrays:
            raise SurgeryError(f"{IDS} are missing", fix=f"generate({{{IDS!r}: array}}, …)")
        ids = self.inputs[IDS].array(arrays[IDS])
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            why = f"they are {ids.dtype.name}{ids.shape}"
            raise SurgeryError(f"{IDS} must be whole numbers (batch, positions)", why=why)
        mask = np.asarray(arrays.pop(MASK)) if MASK in arrays else np.ones(ids.shape, np.int64)
        if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
            raise SurgeryError(
                f"the {MASK} is not an array of ones and zeros with the shape of {IDS}", why=f"it is {mask.shape}"
            )
        if not mask[:, -1].all():
            why = "new tokens would follow the padding"
            raise SurgeryError("a text ends in padding", why=why, fix="pad texts on the left")
        if not mask.all() and MASK not in self.inputs:
            raise SurgeryError(
                f"the file takes no {MASK}", fix="give texts of one length, or export the file with an attention_mask"
            )
        positions = np.where(mask == 0, 0, mask.astype(np.int64).cumsum(-1) - 1)  # as transformers counts them
        if POSITIONS in arrays and POSITIONS in self.inputs:
            positions = np.asarray(arrays.pop(POSITIONS))
            _require(positions.shape == ids.shape, f"{POSITIONS} are {positions.shape}, and {IDS} {ids.shape}")
        arrays.pop(IDS)
        if internal := [name for name in arrays if name in self.cache or name == PLACES]:
            raise SurgeryError(
                f"{internal[0]} is not an input of generate, which computes it",
                fix="leave it out, and give the whole text",
            )
        texts = Texts(ids, mask, positions)
        empty_cache = {name: self._empty_cache(name, len(ids)) for name in self.cache}
        checked = self.runner.feeds.check({**arrays, **self._arrays(texts), **empty_cache})
        texts.further = {name: checked[name] for name in arrays}
        texts.past = {name: value_of(checked[name]) for name in empty_cache}
        return texts

    def _empty_cache(self, name: str, batch: int) -> np.ndarray:
        """Returns a cache input without positions."""
        cache_input = self.inputs[name]
        free = [axis for axis, size in enumerate(cache_input.shape) if axis and not isinstance(size, int)]
        _require(len(free) == 1, f"{name} {cache_input.shape} has not exactly one free axis for positions")
        shape = [
            batch if not axis and not isinstance(size, int) else size for axis, size in enumerate(cache_input.shape)
        ]
        shape[free[0]] = 0
        return np.zeros(shape, dtype_of(cache_input.dtype))

    # Steps ----------------------------------------------------------------------------------------------------

    def tokens(
        self, texts: Texts, count: int, ends: int | Sequence[int] | None, padding: int | None, pick: Pick
    ) -> Iterator[np.ndarray]:
        """Yields the next tokens (batch) of each step. The arguments are checked before the first step."""
        if type(count) is not int or count < 1:
            raise SurgeryError(f"max_new_tokens={count!r} is not a whole number from 1")
        end_ids = [] if ends is None else [ends] if isinstance(ends, (int, np.integer)) else list(ends)
        for token in (*end_ids, *([] if padding is None else [padding])):
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
                raise SurgeryError(f"{token!r} is not a token id")
        filling = padding if padding is not None else end_ids[0] if end_ids else 0
        return self._tokens(texts, count, np.array(end_ids, dtype=texts.ids.dtype), filling, pick)

    def _tokens(self, texts: Texts, count: int, ends: np.ndarray, padding: int, pick: Pick) -> Iterator[np.ndarray]:
        done = np.zeros(len(texts.ids), dtype=bool)
        for step in range(count):
            logits = self._logits(texts)
            if not step:
                self._check_padding(texts, logits)
            new = np.where(done, padding, pick(logits)).astype(texts.ids.dtype)
            yield new
            done |= np.isin(new, ends)
            if done.all():
                return
            self._append(texts, new)

    def _logits(self, texts: Texts) -> np.ndarray:
        """Returns the last position's logits, float32 (batch, tokens), and updates the cache."""
        feeds = {name: value_of(array) for name, array in {**texts.further, **self._arrays(texts)}.items()}
        outputs = self.runner.run_values({**self.slot_values, **feeds, **texts.past}, [LOGITS, *self.cache.values()])
        texts.past = {past: outputs[present] for past, present in self.cache.items()}
        return widened(array_of_value(outputs[LOGITS]))[:, -1]

    def _arrays(self, texts: Texts) -> dict[str, np.ndarray]:
        """Returns the inputs of the next step: the new positions if there is a cache, else the whole text."""
        new = slice(texts.read, None)
        feeds = {
            IDS: texts.ids[:, new], MASK: texts.mask, POSITIONS: texts.positions[:, new],
            PLACES: np.arange(texts.ids.shape[1])[new],
        }  # fmt: skip
        feeds = {name: array for name, array in feeds.items() if name in self.inputs}
        return {name: array.astype(dtype_of(self.inputs[name].dtype)) for name, array in feeds.items()}

    def _append(self, texts: Texts, new: np.ndarray) -> None:
        texts.read = texts.ids.shape[1] if self.cache else 0
        texts.ids = np.concatenate([texts.ids, new[:, None]], axis=1)
        texts.mask = np.concatenate([texts.mask, np.ones_like(texts.mask[:, :1])], axis=1)
        texts.positions = np.concatenate([texts.positions, texts.positions[:, -1:] + 1], axis=1)
        if self.cache and self.reread and texts.read < self.reread <= texts.ids.shape[1]:
            texts.read = 0
            texts.past = {name: value_of(self._empty_cache(name, len(texts.ids))) for name in self.cache}

    def _check_padding(self, texts: Texts, logits: np.ndarray) -> None:
        """Checks that padding does not shift positions: runs the row with most padding again without it."""
        if self.runner.takes_padding or texts.mask.all() or POSITIONS in self.inputs:
            return
        row = int(texts.mask.sum(-1).argmin())
        not_padding = texts.mask[row].astype(bool)
        alone = Texts(
            texts.ids[row : row + 1, not_padding],
            texts.mask[row : row + 1, not_padding],
            texts.positions[row : row + 1, not_padding],
        )
        batch = len(texts.ids)
        alone.further = {n: a[row : row + 1] if a.ndim and len(a) == batch else a for n, a in texts.further.items()}
        alone.past = {name: value_of(self._empty_cache(name, 1)) for name in self.cache}
        expected = self._logits(alone)[0]
        tolerance = 1e-4 if self.computes_in_float32 else 3e-2
        if np.abs(expected - logits[row]).max() > tolerance * max(1.0, np.abs(expected).max()):
            why = f"it has no input {POSITIONS}, and counts the padding as positions"
            fix = f"export it with {POSITIONS} among the example inputs, or give it texts of one length"
            raise SurgeryError("this file can't continue texts that are padded on their left", why=why, fix=fix)
        self.runner.takes_padding = True

    @property
    def computes_in_float32(self) -> bool:
        """Whether neither the logits nor the cache are in half precision."""
        kinds = {node.type for node in self.runner.session.get_outputs() if node.name == LOGITS}
        kinds |= {f"tensor({self.inputs[name].dtype})" for name in self.cache}
        return not any("16" in kind for kind in kinds)


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise SurgeryError("texts can't be continued with this file", why=why)
