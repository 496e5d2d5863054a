"""Converts changes of weights to plain LoRA: those of other rules, and those of a model that was trained in full."""
