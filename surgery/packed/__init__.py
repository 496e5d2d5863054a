"""Packed weights: what a quantised module offers the engine, one file for each backend."""
