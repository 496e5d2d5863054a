"""Structures of operations, and where they are found."""
