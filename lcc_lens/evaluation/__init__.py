"""Evaluation: losses, accuracies, speed, and methods held against each other and against baselines."""
