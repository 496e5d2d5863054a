"""Whole models: every family, real weights, training, generation, saving."""
