"""Matrices replaced by products of two smaller ones: directions, ranks, and the model that is left."""
