"""The exit codes of the command; wrong arguments are typer's 2."""

__all__ = ["ERROR", "INTERRUPTED"]

ERROR = 1
INTERRUPTED = 130  # of a program that Ctrl-C ended, by convention 128 + the signal
