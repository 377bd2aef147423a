"""Checkpoints in use from the command line: names resolved, models opened, rows read."""
