"""A rule's own code, run so that what it raises is told with its place."""

from __future__ import annotations

from types import TracebackType

from surgery.authoring.declaration import Declaration
from surgery.errors import SiteError, SurgeryError
from surgery.transaction.user_frames import line_of

__all__ = ["HookCall"]


class HookCall:
    """A rule's own code at a site: what it raises is told with the rule, the hook and the path."""

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
    "rewrite": "correct the rule's own code; what takes real tensors or numbers alone goes into site.apply(function)"
}
