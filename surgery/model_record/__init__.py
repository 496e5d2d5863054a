"""Finds a model's record, where each verb begins, and gives state dicts by adapter."""
