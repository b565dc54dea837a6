"""Functions that make a model smaller."""
