"""The rule library, method by method."""
