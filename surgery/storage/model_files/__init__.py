"""Whole models in the files of other programs, made from a checkpoint of transformers."""
