"""Held-out numbers with their intervals, and the metrics of generated text."""
