"""Several processes on one training: who they are, what they say to each other, and how they share a step's rows."""
