"""PEFT's checkpoints as adapters of an exported file. Needs no torch."""
