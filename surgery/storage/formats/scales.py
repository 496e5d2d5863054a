"""The ways in which formats say the scale of a change, each read and written. A format names one of them."""

from __future__ import annotations

from surgery.storage.formats.alpha_keys import read_alpha_keys, write_alpha_keys
from surgery.storage.formats.common_scale import (
    fold_to_one_alpha,
    one_rank,
    read_nothing,
    read_one_alpha,
    read_one_scale,
    write_nothing,
    write_one_alpha,
    write_one_scale,
)
from surgery.storage.formats.contents import Contents
from surgery.storage.formats.peft_settings import read_peft, read_settings_alpha, write_peft, write_peft_settings
from surgery.storage.formats.scale_values import Scale, Written

__all__ = ["SCALES"]


def _write_settings_alpha(contents: Contents, written: Written) -> None:
    """torchtune's recipes take one rank and one alpha from the settings, and pass over patterns."""
    if all(change.rank for _, _, change in contents.each()):
        one_rank(contents)
        fold_to_one_alpha(contents, written)
    write_peft_settings(contents, written)


SCALES: dict[str, Scale] = {
    "alpha_key": Scale(read_alpha_keys, write_alpha_keys),
    "one_scale": Scale(read_one_scale, write_one_scale),
    "one_alpha": Scale(read_one_alpha, write_one_alpha),
    "none": Scale(read_nothing, write_nothing),
    "settings_alpha": Scale(read_settings_alpha, _write_settings_alpha),
    "peft": Scale(read_peft, write_peft_settings),
    "diffusers": Scale(read_peft, write_peft),
}
