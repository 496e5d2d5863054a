"""What a rewritten model carries: adapters' tensors, and records on the model and on each site."""
