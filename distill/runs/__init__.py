"""Runs of a plan, and the model folders that they leave."""
