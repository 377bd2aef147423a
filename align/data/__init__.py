"""Data: sources -> rows -> checked examples -> filters -> train and held-out parts."""
