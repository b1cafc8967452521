"""Comparison: methods, baselines and controls trained on the same batches and measured on the same items."""
