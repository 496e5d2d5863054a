"""Tests of exported files against the live model."""
