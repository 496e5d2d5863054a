"""Tokens put before a text: where a model takes texts, masks, caches and positions."""
