"""Placeholder."""
from surgery.errors import SurgeryError
def fetched(source, subfolder, revision):
    raise SurgeryError(f"there is no folder {source!r}")
