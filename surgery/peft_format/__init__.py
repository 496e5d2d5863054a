"""PEFT's file format: its keys, targets and settings, read and written."""
