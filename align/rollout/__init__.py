"""What models write and what they think of given text: generation, log-probabilities, rewards."""
