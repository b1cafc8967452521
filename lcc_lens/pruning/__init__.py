"""Pruning: from a dense checkpoint to a pruned one, and the closed-form refit of the weights that survive."""
