"""What transformers' own code expects of a model that carries adapters."""
