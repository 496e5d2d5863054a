"""Helpers of many rules: fields, paths, sums, complex weights."""
