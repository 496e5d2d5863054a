"""Tests of the command `surgery`."""
