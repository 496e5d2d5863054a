"""Structures of operations: what a pattern inside a forward looks like, and where it occurs."""
