"""Refit: least squares of the surviving weights against the dense model."""
