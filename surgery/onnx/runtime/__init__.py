"""Exported files at run time: manifests, adapters, sessions, text generation. Needs no torch."""
