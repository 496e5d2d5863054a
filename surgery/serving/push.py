"""`push_adapter`: uploads an adapter to the hub, with a model card that says which programs open it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from surgery.adapter_files.entry import PEFT
from surgery.rewritten_model.verb_root import rewritten
from surgery.serving.check import report_of
from surgery.serving.evaluation import Evaluation, evaluate
from surgery.serving.facts import base_problems
from surgery.serving.known import target_profiles
from surgery.serving.source import ModelSource
from surgery.storage.hub_upload import card_of, upload
from surgery.storage.save import save_adapter

__all__ = ["answers_of", "push_adapter"]


def push_adapter(
    model: nn.Module,
    repo_id: str,
    adapter: str = "default",
    *,
    format: Literal["auto", "peft", "surgery"] = "auto",
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Save an adapter into a repository of the hub, with a model card.

        push_adapter(model, "me/topics", licence="apache-2.0", metadata={"accuracy": 0.97})
        load_adapter(other, "me/topics")

    The repository is created if it is absent. The card lists the base, the rules, their counts of parameters, which
    programs open the adapter (`check_target`), and `metadata`. The hub's endpoint is `HF_ENDPOINT`, as in
    huggingface_hub.

    Args:
        model: a model with the adapter.
        repo_id: name of the repository, "owner/name".
        adapter: the adapter's name; default "default".
        format: `save_adapter`'s; default "auto".
        metadata: `save_adapter`'s, such as figures; default None.
        licence: `save_adapter`'s; default None.
        private: huggingface_hub's; default None.
        token: huggingface_hub's; default None.
        revision: the branch; default None, the main branch.
        message: the commit's message; default "The adapter <name>".

    Returns:
        The address of the commit.

    Raises:
        SurgeryError: the adapter can't be saved, or the hub refuses.
    """
    model, _ = rewritten(model)
    with tempfile.TemporaryDirectory() as place:
        folder = save_adapter(model, place, adapter, format=format, metadata=metadata, licence=licence)
        peft = (folder / PEFT[0]).exists()
        programs = answers_of(model, adapter, "peft" if peft else "surgery")
        labels: dict[str, Any] = {"metadata": metadata, "licence": licence}
        card = card_of(model, adapter, repo_id, peft=peft, programs=programs, **labels)
        commit_message = message or f"The adapter {adapter}"
        return upload(folder, repo_id, card, commit_message, private=private, token=token, revision=revision)


def answers_of(model: nn.Module, adapter: str, format: str) -> list[tuple[str, str]]:
    """Whether each program opens an adapter that was saved in a format: its title, and the answer.

    No rule is converted to LoRA for this, since that may take long.
    """
    source = ModelSource(model, adapter, converts=False)
    return [
        (f"{profile.title} {profile.version}", _answer(evaluate(profile, source), source, format))
        for profile in target_profiles().values()
    ]


def _answer(result: Evaluation, source: ModelSource, format: str) -> str:
    command = f'`save_adapter(model, folder, target="{result.profile.name}")`'
    if result.files is not None:
        as_it_is = result.profile.format == format and all(site.state == "taken" for site in result.sites)
        return "yes" if as_it_is else f"after {command}"
    if result.unconverted and not any(base_problems(result.profile, source.facts)):
        return f"perhaps, as a LoRA: {command}"
    return f"no: {report_of(result, source, others=False).summary()}"
