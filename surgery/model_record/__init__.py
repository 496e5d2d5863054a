"""A model's record as a whole: where each verb begins, and state dicts by adapter."""
