"""Recipes, the plan that is made of one, and what is told of it before anything runs."""
