"""The calls with which a model is exported and compared: examples, other sizes, caches."""
