"""The calls that a model is exported and compared with: examples, other sizes, caches."""
