"""What the author of a rule writes, beside the same Python written by hand."""
