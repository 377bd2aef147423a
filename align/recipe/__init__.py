"""Recipes: what may stand in one, and how a YAML file becomes checked settings."""
