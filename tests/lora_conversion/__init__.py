"""Tests of conversions of changes of weights to LoRA."""
