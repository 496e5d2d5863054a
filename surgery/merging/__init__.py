"""Folds adapters into the base's weights and takes them out again."""
