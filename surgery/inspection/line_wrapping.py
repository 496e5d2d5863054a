"""Wraps long lines of code: the arguments of the call at the end of a line get lines of their own."""

from __future__ import annotations

import io
import tokenize

__all__ = ["wrapped"]


def wrapped(text: str, width: int) -> list[str]:
    """Split a line that is wider than `width` and ends with a call or a collection; return other lines whole."""
    if len(text) <= width or text.startswith("#"):
        return [text]
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string]
    if tokens[-1].string not in _CLOSING:
        return [text]
    depth, cuts = 0, list[int]()
    for token in reversed(tokens):
        if token.string in _CLOSING:
            depth += 1
        elif token.string in _OPENING:
            depth -= 1
            if not depth:
                cuts.append(token.end[1])
                break
        elif depth == 1 and token.string == ",":
            cuts.append(token.end[1])
    cuts = [*reversed(cuts), len(text) - 1]
    items = [text[start:end].strip().rstrip(",") for start, end in zip(cuts, cuts[1:], strict=False)]
    if items == [""]:
        return [text]
    inner = [part for item in items if item for part in _with_comma(wrapped(item, width - 4))]
    return [text[: cuts[0]], *(f"    {part}" for part in inner), text[-1]]


def _with_comma(lines: list[str]) -> list[str]:
    return [*lines[:-1], f"{lines[-1]},"]


_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
