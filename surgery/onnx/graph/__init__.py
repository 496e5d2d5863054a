"""The exported graph: traced, translated, with slots, described and written."""
