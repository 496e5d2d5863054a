"""Runs an exported file with onnxruntime, each call with its own adapters. Works without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError, abbreviate, near_misses
from surgery.onnx.runtime.dtypes import array_of_value, value_of
from surgery.onnx.runtime.feeds import Feeds, Input
from surgery.onnx.runtime.generation import Decoder
from surgery.onnx.runtime.loaded_adapters import Adapter, LoadedAdapters
from surgery.onnx.runtime.manifest import Manifest
from surgery.onnx.runtime.sampling import make_picker
from surgery.onnx.runtime.sessions import first_line, open_session

__all__ = ["OnnxRunner"]


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
        self.session = open_session(self.path, providers, threads)
        self.manifest = Manifest.read(self.session)
        required = {node.name: Input.of(node) for node in self.session.get_inputs()}
        overridable = {node.name: Input.of(node) for node in self.session.get_overridable_initializers()}
        self._loaded = LoadedAdapters(self.path, self.manifest, required, overridable)
        slots = self.manifest.by_name
        self.feeds = Feeds(
            [node for name, node in required.items() if name not in slots],
            [node for name, node in overridable.items() if name not in slots],
        )
        self._output_names = tuple(node.name for node in self.session.get_outputs())
        self._cache_inputs = [entry["past"] for entry in self.manifest.cache]
        self._empty_prompts = self._loaded.empty_prompts() if self._cache_inputs else {}
        self.takes_padding = False  # True after a text padded on its left gave the same logits as without padding

    def __repr__(self) -> str:
        outputs, adapters = abbreviate(self._output_names, "outputs"), abbreviate(self.adapters, "adapters")
        lines = [f"inputs    {self.feeds}", f"outputs   {outputs}", f"adapters  {adapters or 'none'}"]
        return "\n  ".join([f"OnnxRunner({self.path.name!r})", *lines])

    # Adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._loaded.names

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
        self._loaded.load(name, source, replace)

    def unload(self, name: str) -> None:
        """Remove an adapter. Running calls keep it."""
        self._loaded.unload(name)

    def slot_values(self, adapter: Adapter) -> dict[str, Any]:
        """Return the slots' OrtValues for a call with this adapter, or with several that have no site in common."""
        return self._loaded.slot_values(adapter)

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
        names = self._output_names if outputs is None else tuple(outputs)
        if unknown := [name for name in names if name not in self._output_names]:
            why = near_misses(str(unknown[0]), self._output_names) or f"it has {', '.join(self._output_names[:8])}"
            raise SurgeryError(f"there is no output {unknown[0]!r}", why=why)
        feeds = {name: value_of(array) for name, array in self.feeds.check(inputs).items()}
        results = self.run_values({**self.slot_values(adapter), **feeds}, names)
        return {name: array_of_value(value) for name, value in results.items()}

    def run_values(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Run the graph on OrtValues, including those of the slots, and return OrtValues."""
        values = dict(values)
        if self._empty_prompts and any(0 not in values[name].shape() for name in self._cache_inputs if name in values):
            values.update({name: empty for name, empty in self._empty_prompts.items() if name in values})
        try:
            results = self.session.run_with_ort_values(list(names), values)
        except Exception as error:  # onnxruntime's errors have no common class
            raise SurgeryError("onnxruntime can't run this", why=first_line(error)) from error
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
        """Yield the next tokens, one array (batch) per step, until all rows have ended.

        Arguments and errors are those of `generate`.
        """
        pick = make_picker(do_sample, temperature, top_k, top_p, seed)
        decoder = Decoder(self, self.slot_values(adapter))
        return decoder.tokens(decoder.start(inputs), max_new_tokens, eos_token_id, pad_token_id, pick)
