"""Reconstruct: windows of decoder layers trained under the mask to give the dense model's hidden states."""
