"""Predicted memory and time of a stage, from a model's config, the settings and a sample of the rows. No torch here.

What is counted and why stands beside each sum; docs/memory.md holds the predictions against what stages took.
"""
