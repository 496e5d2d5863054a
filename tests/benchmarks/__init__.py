"""Speed, size and memory beside the frozen base and beside PEFT: `python -m tests.benchmarks --help`."""
