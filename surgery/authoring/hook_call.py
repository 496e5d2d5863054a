"""Runs a hook of a rule so that its exceptions become errors with the site's path."""

from __future__ import annotations

from types import TracebackType

from surgery.authoring.declaration import Declaration
from surgery.errors import SiteError, SurgeryError
from surgery.transaction.user_frames import line_of

__all__ = ["HookCall"]


class HookCall:
    """A context for a rule's hook at a site. Its exceptions become a `SiteError` with rule, hook and path."""

    __slots__ = ("hook", "path", "rule")

    def __init__(self, rule: Declaration, hook: str, path: str):
        self.rule, self.hook, self.path = rule, hook, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if not isinstance(error, Exception) or isinstance(error, SurgeryError):
            return
        line = line_of(error)
        raise SiteError(
            f"{self.rule.label}.{self.hook} fails",
            where=self.path or "(the model itself)",
            why=f"{type(error).__name__}: {error} ({line})",
            fix=FIXES.get(self.hook, "correct the rule's own code"),
        ) from error


FIXES = {
    "rewrite": "correct the rule's own code; code that needs real tensors or numbers goes into site.apply(function)"
}
