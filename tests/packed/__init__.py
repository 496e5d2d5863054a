"""Tests of patterns and targets."""
