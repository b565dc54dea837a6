"""Removing attention heads and feed-forward neurons from a model."""
