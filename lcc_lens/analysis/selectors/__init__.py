"""Selectors: each gives every head a score with an uncertainty; the heads with the highest scores are restored."""
