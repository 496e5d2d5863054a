"""Tests of structures of operations and their search."""
