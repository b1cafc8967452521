"""Hooked models: forward passes, activations, and the weights behind TransformerLens hooks."""
