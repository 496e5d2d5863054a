"""Arithmetic on bits: changes folded into weights and taken out again to the bit, low-rank products, dtypes."""
