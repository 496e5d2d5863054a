"""`adapter_formats`: lists the formats of adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from surgery.storage.formats import rows as _rows  # registers the formats
from surgery.storage.formats.table import AdapterFormat, formats

__all__ = ["adapter_formats"]

_ROWS = _rows


def adapter_formats() -> Mapping[str, AdapterFormat]:
    """The formats of adapter files by name, for `format=` of `load_adapter`, `save_adapter` and `convert_adapter`.

    >>> from surgery import adapter_formats
    >>> adapter_formats()["mlx"].title
    'MLX-LM'

    Returns:
        Format's name → its table. `save_adapter` also has the format "surgery", which holds any rules.
    """
    return MappingProxyType(dict(formats()))
