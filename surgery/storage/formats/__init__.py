"""Formats of adapter files as a table: each format is rows of data, read and written by one engine."""
