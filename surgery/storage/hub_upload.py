"""Uploads folders to the hub by huggingface_hub alone, and writes model cards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.hub_download import hub_error
from surgery.rewritten_model.state_dict import rules_of
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import sites

__all__ = ["card_of", "upload"]


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
    programs: Sequence[tuple[str, str]] = (),
) -> str:
    """Returns the text of a model card: what the adapter is, and how to load it.

    `programs`: other programs, and whether they open it.
    """
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
    if programs:
        lines += ["## Programs", "", "| program | opens the adapter |", "|---|---|"]
        lines += [*(f"| {_cell(title)} | {_cell(answer)} |" for title, answer in programs), ""]
    if metadata:
        lines += ["## Figures", "", "| figure | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in metadata.items()]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./-]+", value) else '"' + value.replace("\\", "").replace('"', "") + '"'


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
