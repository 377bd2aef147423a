"""Rewards of responses: reward models, rules that verify, a judge, a function of the user's, and their weighted sum."""
