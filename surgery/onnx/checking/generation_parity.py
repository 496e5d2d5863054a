"""Compares greedy decoding. The model reads the whole text again for each token, the file uses its cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.checking.output_differences import TOLERANCES
from surgery.onnx.checking.report import TIE, Decoded

__all__ = ["decode"]

_COMPUTED_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
}  # the runner computes these from a text
_LONGEST = 64  # positions of the example that the model reads again for each token


def decode(
    reference: nn.Module,
    example: ExampleCall,
    path: str | Path,
    manifest: Any,
    adapter: str,
    slot_arrays: Mapping[str, Any],
    tokens: int,
) -> Decoded | str | None:
    """Decodes the example's first row with both.

    Returns None if the file is not a decoder with a cache, or the reason why the file can't decode a text alone.
    """
    ids = example.values.get("input_ids")
    if not manifest.cache or "logits" not in manifest.outputs or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    further = set(manifest.inputs) - {entry["past"] for entry in manifest.cache} - _COMPUTED_INPUTS
    if further:
        return f"not decoded, since it also takes {', '.join(sorted(further)[:3])}"
    if differs := (manifest.further.get("generation") or {}).get("differs"):
        return f"not decoded: {differs}"
    if 1 not in manifest.free.get("input_ids", {}):
        return "not decoded, since the text's length is fixed"
    from surgery.onnx.runtime.runner import OnnxRunner

    row = ids[:1, :_LONGEST]
    expected, gaps, tie = _greedy(reference, row, tokens)
    runner = OnnxRunner(path)
    if slot_arrays:
        runner.load(adapter, slot_arrays)
    continued = runner.generate(
        {"input_ids": row.cpu().numpy()}, max_new_tokens=tokens, adapter=adapter if slot_arrays else None
    )
    new = tuple(int(token) for token in np.asarray(continued)[0, row.shape[1] :])
    if new != expected and new == _from_cache(reference, row, tokens):
        expected = new  # reading a text again differs from a cache if rotations depend on the length
    differs_at = next((i for i, pair in enumerate(zip(expected, new, strict=True)) if pair[0] != pair[1]), None)
    return Decoded(adapter, expected, new, gaps[differs_at] if differs_at is not None else 0.0, tie)


def _greedy(model: nn.Module, ids: Tensor, tokens: int) -> tuple[tuple[int, ...], list[float], float]:
    """Returns the tokens, each step's distance of the two best logits (relative), and the limit of a tie.

    Each of the two logits may differ by the tolerance, so the limit is twice the tolerance.
    """
    text, gaps, tie = ids, [], TIE
    with torch.no_grad():
        for _ in range(tokens):
            prompt_logits = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
            tie = max(TIE, 2 * TOLERANCES.get(str(prompt_logits.dtype).removeprefix("torch."), 0.0))
            logits = prompt_logits[0, -1].double()
            best = logits.topk(2).values
            gaps.append(float((best[0] - best[1]) / max(1.0, float(logits.abs().max()))))
            text = torch.cat([text, logits.argmax().view(1, 1)], dim=1)
    return tuple(text[0, ids.shape[1] :].tolist()), gaps, tie


def _from_cache(model: nn.Module, ids: Tensor, tokens: int) -> tuple[int, ...]:
    """Returns the tokens that the model decodes with its cache, as `generate` does."""
    text, past = ids, None
    with torch.no_grad():
        for _ in range(tokens):
            new = text if past is None else text[:, -1:]
            mask = torch.ones_like(text)
            output = model(input_ids=new, attention_mask=mask, past_key_values=past, use_cache=True)
            past = output.past_key_values
            text = torch.cat([text, output.logits[0, -1].argmax().view(1, 1)], dim=1)
    return tuple(text[0, ids.shape[1] :].tolist())
