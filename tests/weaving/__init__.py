"""Generated forwards: edits inside of them, kinds of calls, fast forms."""
