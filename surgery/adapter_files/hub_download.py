"""Downloads adapters from the hub with huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from surgery.adapter_files.entry import BARE, OLD, PEFT, SURGERY
from surgery.errors import SurgeryError

__all__ = ["download", "hub_error"]

FILES = (*SURGERY, *PEFT, OLD, *BARE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def download(repo_id: str, subfolder: str | None, revision: str | None, names: Sequence[str] = ()) -> Path:
    """Downloads a repository's adapter, unless it is in the cache, and returns its folder.

    `names`: further names or patterns of files.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise SurgeryError(
            f"{repo_id!r} is not a folder, a file or a repository's name", fix="correct the path or the name"
        )
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        place = snapshot_download(
            repo_id, revision=revision, allow_patterns=[prefix + name for name in (*FILES, *names)]
        )
    except Exception as error:  # errors of the hub, its client or the network
        raise hub_error(f"the folder {repo_id!r} does not exist, and the hub has not answered", error) from error
    return Path(place) / prefix


def hub_error(what: str, error: Exception) -> SurgeryError:
    """Returns the error for a failed call to the hub."""
    return SurgeryError(
        what,
        why=f"{type(error).__name__}: {str(error).strip()[:300]}",
        fix="check the name, the network, and `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`",
    )
