"""Edits of a model's structure: children, parameters, attributes and the configuration, each with its exact inverse."""
