"""Adapters saved, loaded, hot-swapped and pushed to a hub."""
