"""Which modules: patterns over types, names and paths, and walks over a model's modules."""
