"""Uploads adapters to the hub with a model card, by huggingface_hub alone."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from surgery.adapter_files.entry import PEFT
from surgery.adapter_files.hub_download import hub_error
from surgery.rewritten_model.state_dict import rules_of
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import sites
from surgery.storage.save import save_adapter

__all__ = ["card_of", "push_adapter", "upload"]


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

    The repository is created if it is absent. The card lists the base, the rules, their counts of parameters, and
    `metadata`. The hub's endpoint is `HF_ENDPOINT`, as in huggingface_hub.

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
        card = card_of(model, adapter, repo_id, peft=(folder / PEFT[0]).exists(), metadata=metadata, licence=licence)
        commit_message = message or f"The adapter {adapter}"
        return upload(folder, repo_id, card, commit_message, private=private, token=token, revision=revision)


def upload(
    folder: str | Path,
    repo_id: str,
    card: str,
    message: str,
    *,
    private: Any = None,
    token: Any = None,
    revision: Any = None,
) -> str:
    """Uploads a folder and its model card as one commit; returns its address."""
    from huggingface_hub import HfApi

    (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # errors of the hub, its client or the network
        raise hub_error(f"the adapter was not pushed to {repo_id}", error) from error
    return str(commit.commit_url)


def card_of(
    model: nn.Module,
    adapter: str,
    repo_id: str,
    *,
    peft: bool,
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> str:
    """Returns the text of a model card: what the adapter is, and how to load it."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    site_tensors = [tensors_of(module, adapter) for _, module, _ in sites(model)]
    count = sum(tensor.numel() for tensors in site_tensors for tensor in tensors.values())
    header = {"library_name": "peft" if peft else "model-surgery", "base_model": base, "license": licence}
    lines = ["---", *(f"{key}: {_quoted(value)}" for key, value in header.items() if value), "tags:", "- model-surgery"]
    lines += ["---", "", f"# {repo_id.rpartition('/')[2]}", ""]
    lines += [f"An adapter for {f'`{base}`' if base else f'a `{type(model).__name__}`'}: {count:,} numbers on "
              f"{sum(map(bool, site_tensors))} modules.", ""]  # fmt: skip
    lines += ["```python", "from surgery import load_adapter", "", f'load_adapter(model, "{repo_id}")', "```", ""]
    lines += ["## Rules", "", *(f"    {rule}" for rule in rules_of(model, adapter)), ""]
    if metadata:
        lines += ["## Figures", "", "| figure | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in metadata.items()]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./-]+", value) else '"' + value.replace("\\", "").replace('"', "") + '"'


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
