"""Exported files beside the live model."""
