"""An exported file run with onnxruntime, each call with the adapter that it asks for. Needs no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.runtime.adapter_check import listed
from surgery.onnx.runtime.adapter_file import opened
from surgery.onnx.runtime.default_inputs import DEFAULTS, defaults_of
from surgery.onnx.runtime.dtypes import array_of_value, dtype_of, value_of
from surgery.onnx.runtime.feeds import Feeds, Input
from surgery.onnx.runtime.generation import Decoder
from surgery.onnx.runtime.manifest import Manifest
from surgery.onnx.runtime.sampling import picker
from surgery.onnx.runtime.sessions import session

__all__ = ["OnnxRunner"]

Adapter = str | Sequence[str] | None


@dataclass(frozen=True)
class _Loaded:
    name: str
    values: Mapping[str, Any]  # OrtValues by slot
    sites: frozenset[tuple[str, str]]


class OnnxRunner:
    """Runs an exported file with any number of adapters. Needs no torch.

    >>> import tempfile, numpy, onnxruntime
    >>> from torch import nn
    >>> from surgery.rules import LoraRule
    >>> from surgery import apply_rules
    >>> from surgery.onnx import OnnxRunner, export_adapter, export_onnx
    >>> model, x = nn.Sequential(nn.Linear(4, 2)), numpy.ones((1, 4), numpy.float32)
    >>> model = apply_rules(model, [LoraRule("0", rank=2, init="random")], adapter="red")
    >>> folder = tempfile.mkdtemp()
    >>> file = f"{folder}/model.onnx"
    >>> import torch
    >>> _ = export_onnx(model, file, torch.ones(1, 4), adapters="slots")
    >>> _ = export_adapter(model, "red", file, f"{folder}/red.onnx_adapter")
    >>> runner = OnnxRunner(file)
    >>> runner.load("red", f"{folder}/red.onnx_adapter")
    >>> name = runner.manifest.inputs[0]
    >>> bool((runner.run({name: x}, adapter="red")["output"] != runner.run({name: x})["output"]).any())
    True

    Calls from several threads are safe: an adapter can be unloaded while calls run with it. Adapters are fed as inputs,
    not by onnxruntime's `add_active_adapter`, which `run_with_iobinding` and required inputs ignore.

    Args:
        path: the exported file.
        providers: onnxruntime's execution providers; default None: the CPU's.
        threads: threads of one operation; default None: onnxruntime's default.

    Raises:
        SurgeryError: the file has no manifest, or a program that rewrote it removed its slots.
    """

    def __init__(self, path: str | Path, providers: Sequence[Any] | None = None, threads: int | None = None) -> None:
        self.path = Path(path)
        self.session = _session(self.path, providers, threads)
        self.manifest = Manifest.read(self.session)
        slots = self.manifest.by_name
        inputs = {node.name: Input.of(node) for node in self.session.get_inputs()}
        further = {node.name: Input.of(node) for node in self.session.get_overridable_initializers()}
        self._outputs = tuple(node.name for node in self.session.get_outputs())
        seen = {**inputs, **further}
        # A program that rewrote the file may have given its slots another precision, which its adapters don't know.
        self._converted = {
            name: seen[name].dtype for name, slot in slots.items() if name in seen and seen[name].dtype != slot.dtype
        }
        if lost := [name for name in slots if name not in inputs and name not in further]:
            why = f"{len(lost)} of {len(slots)}, such as {lost[0]}: a program that rewrote it made them constants"
            fix = 'export it with slots_as="inputs", which such programs keep; or use the file as it was exported'
            raise SurgeryError(f"{self.path.name} has lost its slots", why=why, fix=fix)
        self.feeds = Feeds(
            [node for name, node in inputs.items() if name not in slots],
            [node for name, node in further.items() if name not in slots],
        )
        self._defaults = self._required([name for name in slots if name in inputs])
        self._pasts = [entry["past"] for entry in self.manifest.cache]
        self._once = self._in_caches()
        self._loaded: Mapping[str, _Loaded] = {}  # replaced, never changed: a call has it as it was when it began
        self._lock = threading.Lock()
        self.takes_padding = False  # whether texts that are padded on their left were seen to come out right

    def _required(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of required slots without an adapter; None where they are unknown."""
        defaults = defaults_of(self.path, self.manifest) if names else {}
        return self._as_converted(
            {name: None if (array := defaults[name]) is None else value_of(array) for name in names}
        )

    def _in_caches(self) -> dict[str, Any]:
        """Empty virtual tokens for later calls: after the first call they are in the cache."""
        prompts = [slot for slot in self.manifest.slots if slot.rule == "prompt"] if self._pasts else []
        none = {slot.name: np.zeros([size or 0 for size in slot.shape], dtype_of(slot.dtype)) for slot in prompts}
        return self._as_converted({name: value_of(array) for name, array in none.items()})

    def _as_converted(self, values: dict[str, Any]) -> dict[str, Any]:
        """OrtValues of slots in this file's precision."""
        for name in self._converted.keys() & values.keys():
            if values[name] is not None:
                array, wanted = array_of_value(values[name]), dtype_of(self._converted[name])
                with np.errstate(over="ignore"):
                    converted = array.astype(wanted)
                if not np.isfinite(converted.astype(np.float64)).all():
                    why = f"the file was converted to {self._converted[name]}, which can't hold them"
                    problem = SurgeryError("numbers are too large for the file", where=name, why=why)
                    raise listed(f"{self.path.name} can't take these tensors", [problem])
                values[name] = value_of(converted)
        return values

    # Adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self._loaded)

    def load(self, name: str, source: str | os.PathLike[str] | Mapping[str, Any], *, replace: bool = False) -> None:
        """Load an adapter. Sites for which it has no tensors compute as without an adapter.

        Args:
            name: the adapter's name.
            source: an `.onnx_adapter` file, or slot name → array.
            replace: replace a loaded adapter of this name; default False.

        Raises:
            LoadError: lists what is wrong, such as another base, unknown slots, or a part of a site; loaded adapters
                stay.
            SurgeryError: the name is not a text, or is in use.
        """
        if not isinstance(name, str) or not name:
            raise SurgeryError(f"an adapter's name is a text, not {name!r}")
        if isinstance(source, Mapping):
            tensors = {key: np.array(value) for key, value in source.items()}
            if problems := self.manifest.check(tensors):
                raise listed(f"the adapter {name!r} can't be loaded", problems)
            values = {key: value_of(tensor) for key, tensor in tensors.items()}
        else:
            values = opened(Path(source), self.manifest)
        slots, values = self.manifest.by_name, self._as_converted(dict(values))
        sites = frozenset([(slots[key].site, slots[key].rule) for key in values])
        loaded = _Loaded(name, values, sites)
        with self._lock:
            if name in self._loaded and not replace:
                fix = "another name; unload it first; or replace=True"
                raise SurgeryError(f"an adapter {name!r} is loaded already", fix=fix)
            self._loaded = {**self._loaded, name: loaded}

    def unload(self, name: str) -> None:
        """Remove an adapter. Running calls keep it."""
        with self._lock:
            self._known(name)
            self._loaded = {key: value for key, value in self._loaded.items() if key != name}

    def _known(self, name: str) -> _Loaded:
        adapter = self._loaded.get(name) if isinstance(name, str) else None
        if adapter is None:
            loaded = ", ".join(self._loaded) or "none"
            why = (near_misses(name, self._loaded) if isinstance(name, str) else None) or f"loaded: {loaded}"
            raise SurgeryError(f"there is no adapter {name!r}", why=why, fix="load it first: runner.load(name, file)")
        return adapter

    def slot_values(self, adapter: Adapter) -> dict[str, Any]:
        """The slots' OrtValues for a call with this adapter, or with several that have no site in common."""
        names = [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
        chosen = [self._known(name) for name in names]
        for i, member in enumerate(chosen):
            for other in chosen[:i]:
                if member is other:
                    raise SurgeryError(f"the adapter {member.name!r} is named twice")
                if both := sorted(member.sites & other.sites):
                    where = ", ".join(site for site, _ in both[:3]) + (", …" if len(both) > 3 else "")
                    why = "a slot holds one adapter's tensors"
                    fix = "combine them into one adapter before it is exported: surgery.combine"
                    what = f"{other.name!r} and {member.name!r} can't be used together"
                    raise SurgeryError(what, where=where, why=why, fix=fix)
        values = dict(self._defaults)
        for member in chosen:
            values.update(member.values)
        if lacking := [name for name, value in values.items() if value is None]:
            why = f"what the base has there stands in {self.path.name}{DEFAULTS}, which is missing"
            raise SurgeryError("the slots need an adapter", where=", ".join(lacking[:3]), why=why)
        return values

    # Running --------------------------------------------------------------------------------------------------

    def run(
        self, inputs: Mapping[str, Any], adapter: Adapter = None, *, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the graph on arrays.

        Args:
            inputs: name → array.
            adapter: a loaded adapter, or several that have no site in common; default None: the base.
            outputs: names of outputs to compute; default None: all.

        Returns:
            Output name → array.

        Raises:
            SurgeryError: inputs have other names, dtypes or sizes than the file's; an adapter is not loaded; two are on
                one site.
        """
        names = self._outputs if outputs is None else tuple(outputs)
        if unknown := [name for name in names if name not in self._outputs]:
            why = near_misses(str(unknown[0]), self._outputs) or f"it has {', '.join(self._outputs[:8])}"
            raise SurgeryError(f"there is no output {unknown[0]!r}", why=why)
        feeds = {name: value_of(array) for name, array in self.feeds.checked(inputs).items()}
        results = self.run_values({**self.slot_values(adapter), **feeds}, names)
        return {name: array_of_value(value) for name, value in results.items()}

    def run_values(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Run the graph on OrtValues, including the slots'; returns OrtValues."""
        values = dict(values)
        if self._once and any(0 not in values[name].shape() for name in self._pasts if name in values):
            values.update({name: empty for name, empty in self._once.items() if name in values})
        try:
            results = self.session.run_with_ort_values(list(names), values)
        except Exception as error:  # onnxruntime's have no class of their own in common
            raise SurgeryError("onnxruntime can't run this", why=_first_line(error)) from error
        return dict(zip(names, results, strict=True))

    def bind(self, adapter: Adapter = None) -> Any:
        """Return an IOBinding that contains the adapter's tensors, for `runner.session.run_with_iobinding`.

        The caller binds inputs and outputs. The binding keeps the adapter that was loaded when it was made.
        (`run_with_iobinding` ignores what onnxruntime's `add_active_adapter` activates.)
        """
        binding = self.session.io_binding()
        values = self.slot_values(adapter)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.surgery_values = values  # type: ignore[attr-defined]  # their memory must outlive the binding
        return binding

    # Generating -----------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Any,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        adapter: Adapter = None,
        *,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """Continue texts with a decoder, as transformers' `generate` does.

        Args:
            inputs: `input_ids` (batch, positions), or a mapping of inputs. Texts of several lengths are padded on their
                left, with an `attention_mask`.
            max_new_tokens: default 20.
            eos_token_id: ids that end a row; default None.
            adapter: as in `run`.
            pad_token_id: fills rows that have ended; default None: the first of `eos_token_id`.
            do_sample: draw tokens; default False: take the likeliest.
            temperature: divides the logits; default 1.
            top_k: draw from so many likeliest tokens; default None.
            top_p: draw from the likeliest tokens that together have this probability; default None.
            seed: makes the draws repeatable (they differ from torch's); default None.

        Returns:
            (batch, positions + new): the texts with their continuations.

        Raises:
            SurgeryError: the file is not a decoder's, or inputs or settings do not fit.

        Notes:
            A file with a cache reads each token once; another file reads the whole text again for each token.
        """
        steps = list(self.stream(
            inputs, max_new_tokens, eos_token_id, adapter, pad_token_id=pad_token_id, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        ))  # fmt: skip
        ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
        ids = np.asarray(ids)
        return np.concatenate([ids, np.stack(steps, axis=1).astype(ids.dtype)], axis=1)

    def stream(
        self,
        inputs: Any,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        adapter: Adapter = None,
        *,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[np.ndarray]:
        """As `generate`, but yields the next tokens, one array (batch) per step, until all rows have ended."""
        pick = picker(do_sample, temperature, top_k, top_p, seed)
        decoder = Decoder(self, self.slot_values(adapter))
        return decoder.tokens(decoder.started(inputs), max_new_tokens, eos_token_id, pad_token_id, pick)


def _session(path: Path, providers: Sequence[Any] | None, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns of each slot that it is no constant
    if threads is not None:
        if type(threads) is not int or threads < 1:
            raise SurgeryError(f"threads={threads!r} is not a number of threads")
        options.intra_op_num_threads = threads
    there = onnxruntime.get_available_providers()
    for provider in providers or ():
        name = provider if isinstance(provider, str) else provider[0]
        if name not in there:
            why = near_misses(str(name), there) or f"this onnxruntime has {', '.join(there)}"
            raise SurgeryError(f"there is no provider {name!r}", why=why)
    if not path.is_file():
        raise SurgeryError(f"there is no file {path}")
    try:
        return session(path, options, providers)
    except Exception as error:
        beside_why = "its weights stand in a file beside it, under the name they were written with"
        fix = beside_why if "data" in str(error) else None
        raise SurgeryError(f"onnxruntime can't open {path.name}", why=_first_line(error), fix=fix) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
