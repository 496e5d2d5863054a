"""The exit codes of the command; wrong arguments are typer's 2."""

__all__ = ["ERROR", "INTERRUPTED", "TROUBLE"]

ERROR = 1
TROUBLE = 2  # an error of a command with --exit-code, which says by 1 that something differs; as of `diff`
INTERRUPTED = 130  # of a program that Ctrl-C ended, by convention 128 + the signal
