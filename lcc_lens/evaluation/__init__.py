"""Evaluation: losses, accuracies, speed, and comparisons of methods with each other and with baselines."""
