"""The ways in which formats say the scale of a change, each read and written. A format names one of them."""

from __future__ import annotations

from surgery.storage.formats.alpha_keys import read_alpha_keys, write_alpha_keys
from surgery.storage.formats.common_scale import (
    read_nothing,
    read_one_alpha,
    read_one_scale,
    write_nothing,
    write_one_alpha,
    write_one_scale,
)
from surgery.storage.formats.peft_settings import read_peft, read_settings_alpha, write_peft, write_peft_settings
from surgery.storage.formats.scale_values import Scale

__all__ = ["SCALES"]


SCALES: dict[str, Scale] = {
    "alpha_key": Scale(read_alpha_keys, write_alpha_keys),
    "one_scale": Scale(read_one_scale, write_one_scale),
    "one_alpha": Scale(read_one_alpha, write_one_alpha),
    "none": Scale(read_nothing, write_nothing),
    "settings_alpha": Scale(read_settings_alpha, write_peft_settings),
    "peft": Scale(read_peft, write_peft_settings),
    "diffusers": Scale(read_peft, write_peft),
}
