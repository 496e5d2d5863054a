"""`target_profiles`: lists the programs that adapters are saved for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from surgery.errors import SurgeryError, near_misses
from surgery.serving import image_programs as _image_programs  # registers the profiles
from surgery.serving import language_programs as _language_programs
from surgery.serving.profile import TargetProfile, profiles

__all__ = ["profile_named", "target_profiles"]

_PROGRAMS = (_language_programs, _image_programs)


def target_profiles() -> Mapping[str, TargetProfile]:
    """The programs that `save_adapter(target=…)` and `check_target` know.

    >>> from surgery import target_profiles
    >>> sorted(target_profiles())[:3]
    ['comfyui', 'diffusers', 'llama.cpp']

    Returns:
        Target's name → its profile.
    """
    return MappingProxyType(dict(profiles()))


def profile_named(name: str) -> TargetProfile:
    known = profiles()
    if name not in known:
        fix = f"one of {', '.join(known)}"
        raise SurgeryError(f"there is no target {name!r}", why=near_misses(name, known) or None, fix=fix)
    return known[name]
