"""Compares an adapter with the facts of a profile, without lowering."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from surgery.errors import SurgeryError
from surgery.serving.described import DescribedAdapter
from surgery.serving.profile import TargetProfile
from surgery.storage.formats.contents import BaseFacts, Change

__all__ = ["base_problems", "change_problem", "needs_conversion", "whole_problem"]

HEADS = ("lm_head", "embed_out", "output_projection")  # names of output layers
ROWS = "trainable_tokens_delta"  # PEFT's tensor of trained rows, which become a LoRA on the embedding
_NAMES = {"loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "glora": "GLoRA", "difference": "a change in full"}


def needs_conversion(profile: TargetProfile, described: DescribedAdapter, rank: int | None) -> bool:
    """Whether the adapter must become a plain LoRA for the program; `rank`: the highest that the caller wants."""
    if described.start or any(ROWS in tensors for tensors in described.whole.values()):
        return True
    largest = min(filter(None, (profile.largest_rank, rank)), default=None)
    for _, _, change in described.contents.each():
        if change.kind not in profile.methods or "magnitude" in change.tensors and not profile.dora:
            return True
        if rank is not None and largest is not None and change.rank > largest:
            return True
    return False


def base_problems(profile: TargetProfile, facts: BaseFacts) -> Iterator[SurgeryError]:
    """Yields why the program does not adapt this model."""
    if profile.classes and facts.kind and not _is_adapted(profile, facts.kind):
        if facts.kind in profile.other_classes:
            why = f"{profile.title} {profile.version} runs {facts.kind} without adapters"
        else:
            why = f"the profile of {profile.title} {profile.version} does not have the class {facts.kind}"
        yield SurgeryError(f"{profile.title} does not adapt this model", why=why)
    kind = facts.config.get("model_type")
    if profile.model_types and kind and kind not in profile.model_types:
        why = f"{profile.title} {profile.version} does not have the model_type {kind!r}"
        yield SurgeryError(f"{profile.title} does not run this model", why=why)
    if profile.model_types and facts.kind and not kind:
        why = f"{facts.kind} has no configuration with a model_type"
        yield SurgeryError(f"{profile.title} does not run this model", why=why)


def _is_adapted(profile: TargetProfile, kind: str) -> bool:
    return kind in profile.classes or _causal(kind) in profile.classes


def _causal(kind: str) -> str:
    """The class of the language model of which a class is the classifier."""
    return kind.replace("ForSequenceClassification", "ForCausalLM")


def change_problem(profile: TargetProfile, path: str, change: Change, facts: BaseFacts) -> str | None:
    """Why the program does not take the change of a module; None if it takes it."""
    title, name = profile.title, path.rpartition(".")[-1]
    if change.kind not in profile.methods:
        return f"{title} does not compute {_NAMES.get(change.kind, change.kind)}"
    if "magnitude" in change.tensors and not profile.dora:
        return f"{title} does not compute DoRA"
    if "B_bias" in change.tensors and not profile.lora_bias:
        return f"{title} does not add the bias of a LoRA"
    if profile.largest_rank is not None and change.rank > profile.largest_rank:
        return f"the rank {change.rank} is higher than {title}'s largest one, {profile.largest_rank}"
    if change.embedding:
        return _embedding_problem(profile, name, profile.embeddings, facts)
    if name in HEADS:
        return _embedding_problem(profile, name, profile.heads, facts)
    if "A" in change.tensors and len(kernel := change.tensors["A"].shape[2:]):
        if profile.convolutions == "none" or (profile.convolutions == "pointwise" and set(kernel) != {1}):
            return f"{title} does not adapt convolutions" + (
                " with larger kernels" if profile.convolutions == "pointwise" else ""
            )
    kind = str(facts.config.get("model_type"))
    if {"*", name} & set(profile.lacking.get(kind, ())):
        return f"{title} does not have {name} as a linear layer in models of the type {kind!r}"
    if profile.modules and name not in profile.modules:
        return f"{title} adapts only {', '.join(profile.modules)}"
    if profile.paths and not re.fullmatch(profile.paths, path):
        return f"{title} does not find this path: {profile.paths_reason or profile.paths}"
    return None


def _embedding_problem(profile: TargetProfile, name: str, names: Collection[str], facts: BaseFacts) -> str | None:
    """Why the program does not adapt an embedding or an output layer."""
    if not _is_among(name, profile, names, facts):
        return f"{profile.title} does not adapt {name} of {facts.kind or 'a model'}"
    texts = (facts.config, facts.config.get("text_config"))
    if not profile.tied and any(isinstance(part, Mapping) and part.get("tie_word_embeddings") for part in texts):
        why = "the model's embeddings and output layer are one tensor"
        return f"{profile.title} does not adapt {name} where {why}"
    return None


def _is_among(name: str, profile: TargetProfile, names: Collection[str], facts: BaseFacts) -> bool:
    of_class: Mapping[str, tuple[str, ...]] = profile.embedding_classes
    allowed = {*names, *of_class.get(facts.kind, ()), *of_class.get(_causal(facts.kind), ())}
    return "*" in allowed or name in allowed or bool(of_class) and not facts.kind


def whole_problem(profile: TargetProfile, path: str, names: Collection[str]) -> str | None:
    """Why the program does not take tensors that an adapter holds in full; None if it takes them."""
    if path.rpartition(".")[-1] in profile.trained and set(names) <= {"weight", "bias"}:
        return None
    listed = ", ".join(sorted(names))
    what = f"tensors in full ({listed})"
    if ROWS in names:
        what = "trained rows of embeddings"
    elif set(names) == {"bias"}:
        what = "trained biases"
    elif any(name.endswith(("_A", "_B")) for name in names):
        what = f"LoRA on stacks of experts ({listed})"
    return f"{profile.title} does not take {what}"
