"""Modules that are linear maps: their layouts, what their forward makes of a weight, changes of it."""
