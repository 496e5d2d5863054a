"""Settings of the state machines: STATES is the number of examples, and STATES_SEED the seed of other ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine

__all__ = ["EXAMPLES", "configure"]

EXAMPLES = int(os.environ.get("STATES", "60"))
SEED = int(os.environ.get("STATES_SEED", "0"))


def configure(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Set how many examples a machine runs, of how many steps; without a seed, always the same ones."""
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=not SEED,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    if SEED:
        seed(SEED)(machine)
