"""Policy optimisation: rounds of responses, what they are worth, and the loss that learns from them."""
