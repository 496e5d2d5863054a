"""The command `surgery`: one file a command."""
