"""Reads settings files without trusting them. Works without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["LARGE", "parse_json", "read_json"]

MOST_JSON = 8 << 20  # limit in bytes; settings of adapters have some thousands
LARGE = 256 << 20  # that of lists that grow with a model: the index of 90,000 tensors has 9 MB, a tokenizer up to 35 MB


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Returns the data of a JSON file. Raises `SurgeryError` if it is not JSON or too large.

    `most`: the limit of its bytes.
    """
    try:
        if path.stat().st_size > most:
            raise SurgeryError(
                f"{path.name} is too large", why=f"{path.stat().st_size} bytes, and {most} are the limit"
            )
        return parse_json(path.read_bytes(), path.name)
    except OSError as error:
        raise SurgeryError(f"{path.name} can't be read", why=str(error)) from None


def parse_json(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{what} is not JSON", why=str(error)[:200] or type(error).__name__) from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
