"""What was made, from what, and by which run: data sets, checkpoints, runs and metrics. No torch anywhere below here."""
