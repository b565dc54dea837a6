"""Rows: read from files or the Hub, checked, labelled, tokenized and batched."""

from distill.data.load import DataOptions, load_data

__all__ = ["DataOptions", "load_data"]
