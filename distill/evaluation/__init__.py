"""Scores of a model, how sure they are, and what it costs to run."""
