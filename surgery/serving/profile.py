"""What a program takes as an adapter: a profile as data, and the registry of profiles. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from surgery.errors import SurgeryError

__all__ = ["TargetProfile", "profiles", "register_target"]


@dataclass(frozen=True)
class TargetProfile:
    """What one version of a program takes as an adapter. `save_adapter(target=…)` and `check_target` read it.

    >>> from surgery import target_profiles
    >>> profile = target_profiles()["vllm"]
    >>> profile.format, profile.dora
    ('peft', False)

    Args:
        name: the word for `target=`.
        title: how texts call the program.
        version: the version whose sources say this.
        format: the format of its files; `adapter_formats` lists them.
        sources: where the program's sources say a fact: name of the field → file.
        methods: kinds of change that it computes: "lora", "loha", "lokr", "difference" (a whole ΔW).
        dora: whether it computes DoRA's magnitude.
        ranks: "any": each module has its own rank. "one": all modules have one rank; other ranks are filled up with
            zeros.
        largest_rank: the largest rank; None: any.
        default_rank: the largest rank without `rank_option`; None: `largest_rank`.
        rank_choices: the values that `rank_option` takes; empty: any.
        rank_option: the option that allows a larger rank.
        scale: "module": each module has its own scale. "scale": one scale for all. "alpha": one alpha, which is divided
            by each module's rank. "none": the scale is 1.
        rslora: whether it reads PEFT's `use_rslora`.
        lora_bias: whether it adds the bias of LoRA's second half.
        invocation: whether it computes LoRA that acts after invocation tokens (aLoRA).
        convolutions: "all", "pointwise" (kernels of size 1) or "none".
        embeddings: names of embeddings that it adapts by LoRA; "*": all of them.
        heads: names of output layers that it adapts by LoRA; "*": all of them.
        embedding_classes: the same for models of some classes: class → names of embeddings and output layers.
        tied: whether it adapts embeddings and output layers that are one tensor (`tie_word_embeddings`).
        trained: names of modules that an adapter may hold in full.
        modules: names of modules that it adapts; empty: any.
        lacking: value of `model_type` → names of modules that it does not have there; "*": all of them.
        groups: modules whose changes must come together; zeros are written for missing ones.
        paths: a regular expression for paths of modules that it adapts; "": any.
        paths_reason: why it does not adapt other paths.
        classes: names of models' classes that it adapts; empty: any.
        other_classes: names of models' classes that it runs, and does not adapt.
        model_types: values of `model_type` that it runs; empty: any.
        dtypes: dtypes of the tensors that it reads; empty: any.
        command: how the program is started with the adapter.
        notes: what a person should know.
    """

    name: str
    title: str
    version: str
    format: str
    sources: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("lora",)
    dora: bool = False
    ranks: Literal["any", "one"] = "any"
    largest_rank: int | None = None
    default_rank: int | None = None
    rank_choices: tuple[int, ...] = ()
    rank_option: str = ""
    scale: Literal["module", "scale", "alpha", "none"] = "module"
    rslora: bool = False
    lora_bias: bool = False
    invocation: bool = False
    convolutions: Literal["all", "pointwise", "none"] = "none"
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    embedding_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: bool = False
    trained: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    paths: str = ""
    paths_reason: str = ""
    classes: frozenset[str] = frozenset()
    other_classes: frozenset[str] = frozenset()
    model_types: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()


_profiles: dict[str, TargetProfile] = {}


def register_target(profile: TargetProfile) -> TargetProfile:
    """Add a program to those that `save_adapter(target=…)` and `check_target` know.

        register_target(TargetProfile("mine", "My server", "1.0", format="peft", largest_rank=32))

    Args:
        profile: what the program takes.

    Returns:
        The profile.

    Raises:
        SurgeryError: another profile has the name.
    """
    other = _profiles.get(profile.name)
    if other is not None and other != profile:
        why = f"{other.title} {other.version}"
        raise SurgeryError(f"there is a target {profile.name!r} already", why=why, fix="give it another name")
    _profiles[profile.name] = profile
    return profile


def profiles() -> Mapping[str, TargetProfile]:
    """All registered profiles by name, in the order of their registration."""
    return _profiles
