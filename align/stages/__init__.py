"""The stages: each reads settings and inputs, writes a checkpoint into a folder, and says what it made.

Adding a stage is one file here with a `run`, one settings class in recipe.py, and one line in STAGES of run.py.
"""
