"""`Facts`: what is known of one function from its source."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.planning.attribute_chains import NO_CHAINS, Chain, Chains
from surgery.planning.settled_branches import Tests

__all__ = ["Facts"]


@dataclass(eq=False)
class Facts:
    """The content of one function's source: returned chains, used chains, calls, and the tests around calls."""

    parameters: list[str]
    module: str
    file: str = ""
    start: int = 0
    lines: tuple[str, ...] = ()
    decorated: bool = False
    dynamic: bool = False  # it accesses attributes by names that are not in its source
    returns: Chains = NO_CHAINS
    uses: tuple[tuple[Chain, bool], ...] = ()  # True: every run of the function reaches the use
    calls: tuple[tuple[Chain, tuple[tuple[int | str, Chain], ...], bool], ...] = ()
    behind: dict[Chain, tuple[Tests, ...]] = field(
        default_factory=dict
    )  # by the chain of the callee: the tests around the calls
