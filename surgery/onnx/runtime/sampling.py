"""Chooses the next tokens: the likeliest, or random draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from surgery.errors import SurgeryError

__all__ = ["make_picker", "probabilities"]

Pick = Callable[[np.ndarray], np.ndarray]


def make_picker(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> Pick:
    """Returns a function that chooses a token for each row of logits (batch, tokens)."""
    if not do_sample:
        settings = {"temperature": temperature != 1.0, "top_k": top_k, "top_p": top_p, "seed": seed is not None}
        if used := [name for name, value in settings.items() if value]:
            raise SurgeryError(f"{used[0]} has no effect, because no tokens are drawn", fix="do_sample=True")
        return lambda logits: logits.argmax(-1)
    numbers = (int, float)
    if type(temperature) not in numbers or not 0 < temperature < float("inf"):
        raise SurgeryError(
            f"temperature={temperature!r} is not a number above 0", fix="do_sample=False is its limit at 0"
        )
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise SurgeryError(f"top_k={top_k!r} is not a whole number from 1")
    if top_p is not None and (type(top_p) not in numbers or not 0 < top_p <= 1):
        raise SurgeryError(f"top_p={top_p!r} is not a probability above 0, up to 1")
    generator = np.random.default_rng(seed)

    def pick(logits: np.ndarray) -> np.ndarray:
        cumulative = probabilities(logits, temperature, top_k, top_p).cumsum(-1)
        threshold = generator.random((len(logits), 1)) * cumulative[:, -1:]
        return (cumulative <= threshold).sum(-1).clip(max=logits.shape[-1] - 1)

    return pick


def probabilities(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Returns each token's probability. The order is that of transformers: temperature, top_k, top_p."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        smallest = np.partition(scores, -top_k, axis=-1)[:, -top_k, None]
        scores = np.where(scores < smallest, -np.inf, scores)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = chances.argsort(-1, kind="stable")  # ascending
        dropped = np.take_along_axis(chances, order, -1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        excluded = np.empty_like(dropped)
        np.put_along_axis(excluded, order, dropped, -1)
        chances[excluded] = 0.0
        chances /= chances.sum(-1, keepdims=True)
    return chances
