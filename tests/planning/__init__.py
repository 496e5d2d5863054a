"""Tests of plans: every problem shows before the model changes."""
