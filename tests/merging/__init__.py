"""Adapters folded into the base's weights, and taken out again."""
