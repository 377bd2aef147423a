"""Critique and revise by a constitution (Bai 2022): who judges, and what is written about each prompt."""
