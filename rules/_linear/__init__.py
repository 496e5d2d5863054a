"""Modules that are linear maps: their layouts, how their forward uses the weight, and changes of the weight."""
