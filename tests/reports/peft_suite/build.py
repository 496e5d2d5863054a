"""Build the stand-in models and adapters; run with HF_HOME set: `python -m tests.reports.peft_suite.build`."""

from __future__ import annotations

import warnings

from tests.reports.peft_suite import adapters, models


def main() -> None:
    warnings.simplefilter("ignore")
    missing = models.build() + adapters.build()
    print("\n".join(["Could not be built; the tests that load them are skipped or fail with either side:", *missing])
          if missing else "all stand-ins are built")  # fmt: skip


if __name__ == "__main__":
    main()
