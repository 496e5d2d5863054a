"""Tests of the verbs on adapters, alone and in every order."""
