"""Converts PEFT checkpoints into adapters of an exported file. Works without torch."""
