"""Tests, and in `tests.benchmarks` the measurements. A package, since installed ones are called `tests`, too."""
