"""Sparse dictionaries of residual streams: activations in, BatchTopK SAEs out, saved as anybody's tools read them.

Knows: models and their hooks. Does not know: traits, judges, persona vectors.
"""
