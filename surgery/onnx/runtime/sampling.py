"""Which token comes next: the likeliest, or one drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from surgery.errors import SurgeryError

__all__ = ["picker", "probabilities"]

Pick = Callable[[np.ndarray], np.ndarray]


def picker(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> Pick:
    """What picks a token for each row of logits (batch, tokens)."""
    if not do_sample:
        settings = {"temperature": temperature != 1.0, "top_k": top_k, "top_p": top_p, "seed": seed is not None}
        if said := [name for name, value in settings.items() if value]:
            raise SurgeryError(f"{said[0]} says how tokens are drawn, and none are", fix="do_sample=True")
        return lambda logits: logits.argmax(-1)
    numbers = (int, float)
    if type(temperature) not in numbers or not 0 < temperature < float("inf"):
        raise SurgeryError(
            f"temperature={temperature!r} is not a number above 0", fix="do_sample=False is its limit at 0"
        )
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise SurgeryError(f"top_k={top_k!r} is no whole number from 1")
    if top_p is not None and (type(top_p) not in numbers or not 0 < top_p <= 1):
        raise SurgeryError(f"top_p={top_p!r} is no share above 0, up to 1")
    draws = np.random.default_rng(seed)

    def pick(logits: np.ndarray) -> np.ndarray:
        rising = probabilities(logits, temperature, top_k, top_p).cumsum(-1)
        drawn = draws.random((len(logits), 1)) * rising[:, -1:]
        return (rising <= drawn).sum(-1).clip(max=logits.shape[-1] - 1)

    return pick


def probabilities(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Each token's chance; as transformers' warpers, temperature first, then top_k, then top_p."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = np.partition(scores, -top_k, axis=-1)[:, -top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = chances.argsort(-1, kind="stable")  # from the least likely on
        gone = np.take_along_axis(chances, order, -1).cumsum(-1) <= 1 - top_p
        gone[:, -1] = False
        left_out = np.empty_like(gone)
        np.put_along_axis(left_out, order, gone, -1)
        chances[left_out] = 0.0
        chances /= chances.sum(-1, keepdims=True)
    return chances
