"""Describe a checkpoint without running it: its layers, linear layers, zeros, and biases that can hold constants."""
