"""Readers of the files that rows come in."""
