"""Forwards as graphs."""
