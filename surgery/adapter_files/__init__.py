"""Reads and writes adapters' files: tensors, JSON, downloads from the hub."""
