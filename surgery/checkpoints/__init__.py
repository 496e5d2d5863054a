"""Merges adapters into checkpoints file by file, without loading the model, and takes the merge out again."""
