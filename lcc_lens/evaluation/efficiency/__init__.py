"""Efficiency: zeros, sizes and latency of a model, and what its sparsity saves on disk and on hardware."""
