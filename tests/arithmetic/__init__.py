"""Arithmetic on bits: folds and their inverse, and what a precision loses."""
